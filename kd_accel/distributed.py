"""Process group of a launch: start, checks, collectives on Python objects, and failures of peers.

Without a GPU and without a flag for the CPU, Accelerate silently leaves each process on its own, and all of them would write to
one run directory. So the flag is set here if no GPU is found, and the number of joined processes is compared with that of the
launcher.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
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
from kd_accel.exit_codes import report_lost_peers
from kd_accel.io.files import refused_by_disk

__all__ = [
    "Accelerator",
    "accelerate_state_restored",
    "gathered",
    "launch_notices",
    "leave_processes",
    "missing_gpu",
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
_COMMUNICATION_ERRORS = ("gloo/", "NCCL", "nccl", "Operation timed out!")
"""Texts of errors: gloo has the names of its files in them, and a timeout of `Work.wait` only this sentence."""


def start_processes(
    precision: Precision, *, seed: int = 0, track_with: str | None = None, timeout_s: float | None = None
) -> Accelerator:
    """Join the launched processes, and seed the global random generators, differently on each rank (for dropout).

    An existing process group is used again.

    Args:
        precision: Precision of the forward under autocast; float32 = no autocast.
        seed: Seed of the run.
        track_with: Name of a tracker of Accelerate; None = no tracker.
        timeout_s: Timeout of the communication between processes in seconds, `train.timeout_s`; None = the default.

    Returns:
        The accelerator of the launch.

    Raises:
        UserError: If the launch is incomplete, or contradicts the config.
    """
    _refuse_contradictions(precision)
    # The state of an earlier run in this process would impose its precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = _joined(precision, track_with, timeout_s)
    except ValueError as error:  # Accelerate's, if WORLD_SIZE is set and RANK or an address is not
        raise UserError(f"the launch is incomplete: {error}; start with one of the files in launch/") from None
    except RuntimeError as error:
        if not _is_communication(error):
            raise
        raise UserError(
            f"the launch is incomplete: the processes could not connect ({_first_line(error)}); start a launcher on every "
            "node, each with its own machine_rank and the same address and port of node 0, which must be open. On a node with "
            "several networks, set GLOO_SOCKET_IFNAME to the name of the interface"
        ) from None
    refuse_unjoined(accelerator)
    set_seed(seed, device_specific=True)
    return accelerator


@contextlib.contextmanager
def accelerate_state_restored() -> Iterator[None]:
    """Restore Accelerate's global state after the `with` block, so that an accelerator of the caller keeps its precision."""
    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        yield
    finally:
        for state, values in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)


def _joined(precision: Precision, track_with: str | None, timeout_s: float | None) -> Accelerator:
    group_timeout_s = peer_timeout_s(timeout_s) + (_NCCL_MARGIN_S if torch.cuda.is_available() else 0.0)
    handlers: list[Any] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timedelta(seconds=group_timeout_s)),
    ]
    return Accelerator(
        mixed_precision="no" if precision == "float32" else precision,
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=1,
        dynamo_backend="no",
        log_with=track_with,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=handlers,
    )


def peer_timeout_s(timeout_s: float | None) -> float:
    """Return the timeout of gloo's communication in seconds.

    NCCL's timeout is a minute longer: its watchdog aborts the process without an exception, so gloo's error must come first.

    Args:
        timeout_s: The setting `train.timeout_s`; None = the default of the device.
    """
    if timeout_s is not None:
        return timeout_s
    return _GPU_TIMEOUT_S if torch.cuda.is_available() else _CPU_TIMEOUT_S


@contextlib.contextmanager
def peers_needed(accelerator: Accelerator, place: Callable[[], str]) -> Iterator[None]:
    """Turn an error of the communication between processes, inside the `with` block, into PeerLost.

    Args:
        accelerator: Accelerator of the launch.
        place: Function that returns the progress of this process for the message, as "after step 100".

    Raises:
        PeerLost: If the communication has failed.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _is_communication(error):
            raise
        message = (
            f"rank {accelerator.process_index} of {accelerator.num_processes} has lost its peers {place()} "
            f"({_first_line(error)}): a process or a node has died or exceeded train.timeout_s, or the network is down. "
            "The last written files are complete: run the same command again to resume from them"
        )
        report_lost_peers(message)
        raise PeerLost(message) from None


def _is_communication(error: RuntimeError) -> bool:
    """Return whether an error is one of the process group. Most are plain RuntimeErrors, recognized by their text."""
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in _COMMUNICATION_ERRORS)


def _first_line(error: Exception) -> str:
    """Return the first line of an error, without the location in gloo's source before it and gloo's general advice after it."""
    line = str(error).strip().partition("\n")[0].partition(". This is typically caused by")[0]
    return line.rpartition("] ")[2] if line.startswith("[") and "] " in line and ".cc:" in line.partition("] ")[0] else line


def on_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call a function on rank 0 and return its result on every rank. Every rank must call this.

    Args:
        accelerator: Accelerator of the launch.
        function: Function with a picklable result.

    Raises:
        UserError: On every rank, if the function has raised it or an OSError.
        PeerLost: On ranks other than 0, if the function has raised any other exception, which is raised on rank 0.
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
        raise PeerLost(f"rank 0 has failed ({outcome[2]}); see its traceback")
    return outcome[0]


def gathered(items: list[Result], *, group: Any = None) -> list[Result]:
    """Gather items from all ranks. Every rank must call this.

    Args:
        items: Items of this rank, picklable.
        group: Process group; None = all processes.

    Returns:
        The items of all ranks, in the order of the ranks.
    """
    if group is None:
        return gather_object(items)
    parts: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(parts, items, group=group)
    return [item for part in parts for item in part]


def patient_group(accelerator: Accelerator) -> Any:
    """Create a gloo group with a timeout of a day; return None for a single process. Every rank must call this.

    Ranks that read or write their shares of a large cache finish minutes apart, and the default timeout on GPUs is ten minutes.
    The death of a process is still detected at once.
    """
    if accelerator.num_processes == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=_PATIENCE_S))


def leave_processes(accelerator: Accelerator) -> None:
    """End a command's use of the processes. Trackers are finished elsewhere, and may have failed.

    The process group is destroyed only at the exit of the program, because a launch can join only once: a second group would
    find the addresses of the first one in the launcher's store.
    """
    accelerator.trackers.clear()
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _refuse_contradictions(precision: Precision) -> None:
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU, and no GPU was found; use bf16 or float32")
    if int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != 1:
        raise UserError(
            "gradient_accumulation_steps in the launch file would divide every loss a second time; "
            "remove it and set train.grad_accum_steps in the run's config"
        )


def missing_gpu() -> str | None:
    """Return the reason why PyTorch finds no GPU; None if it finds one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if _hides_gpus():
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    return f"PyTorch {torch.__version__} finds none"


def _hides_gpus() -> bool:
    """Return whether the variable of CUDA hides all GPUs: it is empty, or begins with an index that does not exist."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and (not visible.strip() or visible.strip().startswith("-"))


def launch_notices(accelerator: Accelerator) -> list[str]:
    """Return a notice if Accelerate's launcher has started processes that find no GPU, and was not told to use the CPU.

    Both of its ways to start processes set ACCELERATE_DYNAMO_BACKEND. It is told to use the CPU by `--cpu` or `use_cpu`, which
    set ACCELERATE_USE_CPU, or by `gpu_ids`, which sets CUDA_VISIBLE_DEVICES (launch/cpu2.yaml).
    """
    reason = missing_gpu()
    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true") or _hides_gpus()
    if "ACCELERATE_DYNAMO_BACKEND" not in os.environ or reason is None or uses_cpu:
        return []
    count = accelerator.num_processes
    processes = "the process of this launch runs" if count == 1 else f"the {count} processes of this launch run"
    return [
        f"launch: no GPU was found ({reason}), so {processes} on the CPU; check nvidia-smi and the build of PyTorch, or launch "
        "with --cpu or launch/cpu2.yaml if the CPU is intended"
    ]


def refuse_unjoined(accelerator: Accelerator) -> None:
    """Raise UserError if fewer processes have joined than were launched, or if their kind of parallelism is not supported."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} processes, but Accelerate joined {accelerator.num_processes}: each would "
            "train alone and overwrite the others' files; use one of the files in launch/ (distributed_type: MULTI_GPU)"
        )
    if accelerator.num_processes == 1 and _is_alone():
        raise UserError(
            "the launcher was asked for several processes, but has started one: without multi_gpu, Accelerate starts a single "
            "process, also on CPUs; use one of the files in launch/ (distributed_type: MULTI_GPU; launch/cpu2.yaml for CPUs), "
            "add --multi_gpu, or set --num_processes 1"
        )
    if accelerator.distributed_type not in _SUPPORTED:
        raise UserError(
            f"distributed_type: {accelerator.distributed_type.value} is not supported; "
            "use MULTI_GPU (data parallel) as in the files in launch/"
        )


def _is_alone() -> bool:
    """Return whether Accelerate's launcher was asked for several processes and has started this one alone.

    It then sets MASTER_PORT, but no WORLD_SIZE. A MASTER_PORT that the launcher has inherited, as in a job of Slurm, proves
    nothing, so the variables with which launcher and process were started are compared. Only Linux lists them.
    """
    try:
        launcher, own = (_initial_variables(process) for process in (str(os.getppid()), "self"))
    except OSError:
        return False
    return "ACCELERATE_USE_CPU" in own and "MASTER_PORT" in own - launcher and "WORLD_SIZE" not in own


def _initial_variables(process: str) -> set[str]:
    """Return the names of the environment variables with which a process was started."""
    items = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return {item.partition(b"=")[0].decode(errors="replace") for item in items}
