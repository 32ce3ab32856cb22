"""Joining the processes that a launcher started, and the switches that must be set before anything is built.

Accelerate joins processes silently as several runs of one process each when it finds no reason to join them (no GPU and no
flag, for instance); all of them would then write into one run directory. So what the launcher started is compared with what
was joined, and where there is no GPU the program says so to Accelerate itself.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)

from kd_accel.config.schema import Precision
from kd_accel.errors import PeerLost, UserError
from kd_accel.io.files import refused_by_disk

__all__ = [
    "Accelerator",
    "gathered",
    "leave_processes",
    "on_main_process",
    "patient_group",
    "peer_timeout_s",
    "peers_needed",
    "refuse_unjoined",
    "start_processes",
]

Result = TypeVar("Result")

_SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
_CPU_TIMEOUT_S, _GPU_TIMEOUT_S = 1800.0, 600.0
_NCCL_MARGIN_S = 60.0
_PATIENCE_S = 24 * 3600.0


def start_processes(
    precision: Precision, *, seed: int = 0, track_with: str | None = None, timeout_s: float | None = None
) -> Accelerator:
    """Join the launched processes; seed the global generators, differently on each rank (dropout).

    Raises UserError when the launch cannot do what the config says.
    """
    _refuse_contradictions(precision)
    try:
        accelerator = _joined(precision, track_with, timeout_s)
    except ValueError as error:  # what Accelerate raises where WORLD_SIZE is set and the rest of the launch is missing
        raise UserError(f"the launch is incomplete: {error}; start with one of the files in launch/") from None
    except torch.distributed.DistError as error:
        raise UserError(
            f"the launch is incomplete: the processes have not found each other ({_first_line(error)}); start a launcher on "
            "every node, each with its own machine_rank and the same address and port of node 0, which must be open"
        ) from None
    refuse_unjoined(accelerator)
    set_seed(seed, device_specific=True)
    return accelerator


def _joined(precision: Precision, track_with: str | None, timeout_s: float | None) -> Accelerator:
    waits_s = peer_timeout_s(timeout_s) + (_NCCL_MARGIN_S if torch.cuda.is_available() else 0.0)
    handlers: list[Any] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timedelta(seconds=waits_s)),
    ]
    return Accelerator(
        mixed_precision=precision,
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=1,
        dynamo_backend="no",
        log_with=track_with,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,
    )


def peer_timeout_s(timeout_s: float | None) -> float:
    """Return how long a process waits for the others over gloo, in seconds. timeout_s: `train.timeout_s`.

    NCCL waits a minute longer: its watchdog aborts the process without an exception, so gloo's error must come first.
    """
    if timeout_s is not None:
        return timeout_s
    return _GPU_TIMEOUT_S if torch.cuda.is_available() else _CPU_TIMEOUT_S


@contextlib.contextmanager
def peers_needed(accelerator: Accelerator, place: Callable[[], str]) -> Iterator[None]:
    """Inside, an error of the communication between processes is told as what it means. place: how far this one has come.

    Raises PeerLost.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _is_communication(error):
            raise
        raise PeerLost(
            f"rank {accelerator.process_index} of {accelerator.num_processes} has lost the others {place()} "
            f"({_first_line(error)}): a process or a node has died, has not answered within train.timeout_s, or the network "
            "between them is cut. What was written last is whole: start the same command again to go on from it"
        ) from None


def _is_communication(error: RuntimeError) -> bool:
    """The CPUs' library raises plain RuntimeErrors, which name its files."""
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo/", "NCCL", "nccl"))


def _first_line(error: Exception) -> str:
    said = str(error).strip().partition("\n")[0]
    return said.rpartition("] ")[2] if said.startswith("[") and "] " in said and ".cc:" in said.partition("] ")[0] else said


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 alone and return its (picklable) result on every rank.

    Raises UserError on every rank where rank 0 has raised one, or an OSError. Any other exception is raised again on rank 0,
    and PeerLost on the others, which would wait for rank 0 until their time-out.
    """
    outcome: list[Any] = [None, None, None]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = refused_by_disk(error)
        except Exception as error:
            failure, outcome[2] = error, f"{type(error).__name__}: {_first_line(error)}"
    broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise UserError(outcome[1])
    if outcome[2] is not None:
        raise PeerLost(f"rank 0 has failed ({outcome[2]}); its traceback says where")
    return outcome[0]


def gathered(items: list[Result], *, group: Any = None) -> list[Result]:
    """Return the (picklable) items of all ranks in their order. Every rank must call it. group: None = all that joined."""
    if group is None:
        return gather_object(items)
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, items, group=group)
    return [item for part in parts for item in part]


def patient_group(accelerator: Accelerator) -> Any:
    """Create a gloo group whose ranks wait for each other for a day, for the ends of long work; None for a single process.

    Ranks that read or write a share of a large cache end minutes apart, and NCCL gives up after ten. A process that dies is
    noticed at once all the same. Every rank must call it.
    """
    if accelerator.num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE_S))


def leave_processes(accelerator: Accelerator) -> None:
    """End of the program: leave the process group. Trackers are finished by who started them, and may have failed."""
    accelerator.trackers.clear()
    accelerator.end_training()


def _refuse_contradictions(precision: Precision) -> None:
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU, and there is none here; use bf16 or 'no'")
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != 1:
        raise UserError(
            "gradient_accumulation_steps in the launch file would divide every loss a second time; "
            "remove it there and set train.grad_accum_steps in the run's config"
        )


def refuse_unjoined(accelerator: Accelerator) -> None:
    """Raises UserError where the launcher started more processes than found each other, or with another kind of parallelism."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but Accelerate joined {accelerator.num_processes}: each would "
            "train alone and overwrite the others' files; use one of the files in launch/ (distributed_type: MULTI_GPU)"
        )
    if accelerator.distributed_type not in _SUPPORTED:
        raise UserError(
            f"distributed_type: {accelerator.distributed_type.value} is not supported; "
            "use MULTI_GPU (data parallel) as in the files in launch/"
        )
