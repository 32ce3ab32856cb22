"""Passes over many samples: in chunks, in worker processes with a progress bar, and shared out over the ranks of a launch.

Input: a function of sample indices. Output: its results in the order of the samples. At most two chunks per worker are in
memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kd_accel.errors import UserError

if TYPE_CHECKING:
    from kd_accel.distributed import Accelerator

Result = TypeVar("Result")

CHUNK_SAMPLES = 64
"""Samples of one call: few, because encoded photos of tens of megabytes may be among them."""
_FEW_SAMPLES = 512
"""Number of samples up to which the calling process is faster than new workers."""
_MAX_WORKERS = 32
_LOG_EVERY_S = 30.0


def over_samples(
    function: Callable[[np.ndarray], Result], samples: np.ndarray, *, num_workers: int | None, title: str
) -> Iterator[Result]:
    """Yield the result of a function for each chunk of samples, in their order.

    Args:
        function: Function of sample indices, int64 [n]; in worker processes, which receive it by fork or pickle.
        samples: Indices, int64 [N].
        num_workers: Number of worker processes; None = one for each processor of this rank.
        title: Text of the progress bar, which only the main process shows.

    Raises:
        UserError: If the function raises it.
    """
    chunks = [samples[start : start + CHUNK_SAMPLES] for start in range(0, len(samples), CHUNK_SAMPLES)]
    with _bar(len(samples), title) as bar:
        for chunk, result in zip(chunks, _results(function, chunks, _workers(len(samples), num_workers)), strict=True):
            if isinstance(result, UserError):
                raise result
            yield result
            bar.update(len(chunk))


@dataclass(frozen=True)
class Peers:
    """Ranks of a launch that share the work of a pass. Every rank must call the same methods in the same order.

    Args:
        accelerator: Accelerator of the launch; None = this process alone.
    """

    accelerator: Accelerator | None = None

    def all(self, condition: bool) -> bool:  # noqa: FBT001  (the value that is compared)
        """Return whether a condition holds on all ranks."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return condition
        from kd_accel.distributed import gathered

        return all(gathered([condition]))

    def agree(self, value: str) -> bool:
        """Return whether a value is the same on all ranks."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return True
        from kd_accel.distributed import gathered

        return len(set(gathered([value]))) == 1

    def share(self, compute: Callable[[np.ndarray], list[Result]], samples: np.ndarray, *, key: str) -> list[Result]:
        """Compute a function of samples, each rank for a share of them.

        Only ranks with the same key share their work: nodes may have copies of the files that differ.

        Args:
            compute: Function of sample indices, int64 [n], that returns picklable results in their order.
            samples: Indices, int64 [N].
            key: Identification of the files that this rank reads.

        Returns:
            The results of all samples, in their order.

        Raises:
            UserError: On all ranks, if the function raises it on one of them.
        """
        accelerator = self.accelerator
        if accelerator is None or accelerator.num_processes == 1:
            return compute(samples)
        from kd_accel.distributed import gathered, patient_group

        # The ranks finish minutes apart, longer than the default timeout.
        group = patient_group(accelerator)
        keys = gathered([key], group=group)
        peers = [rank for rank, other in enumerate(keys) if other == key]
        share = np.array_split(samples, len(peers))[peers.index(accelerator.process_index)]
        outcome: tuple[list[Result], str | None]
        try:
            outcome = compute(share), None
        except UserError as error:
            outcome = [], str(error)
        outcomes = gathered([outcome], group=group)
        for _, message in outcomes:
            if message is not None:
                raise UserError(message)
        return [result for peer in peers for result in outcomes[peer][0]]


def _workers(num_samples: int, num_workers: int | None) -> int:
    if num_samples <= _FEW_SAMPLES:
        return 0
    if num_workers is not None:
        return num_workers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = min(_MAX_WORKERS, len(os.sched_getaffinity(0)) // ranks)
    return workers if workers > 1 else 0


def _bar(num_samples: int, title: str) -> Any:
    is_main = os.environ.get("RANK", "0") == "0"
    # In a log file each update is a line.
    every_s = 0.1 if sys.stderr.isatty() else _LOG_EVERY_S
    return tqdm(total=num_samples, desc=title, unit="sample", delay=1.0, mininterval=every_s, disable=not is_main)


def _results(
    function: Callable[[np.ndarray], Result], chunks: list[np.ndarray], num_workers: int
) -> Iterator[Result | UserError]:
    dataset = _Calls(function, chunks)
    if num_workers == 0:
        return (dataset[number] for number in range(len(chunks)))
    # A generator of its own: DataLoader would draw its seed from the global one, and change the dropout masks of the run.
    return iter(
        DataLoader(
            dataset,
            batch_size=None,
            num_workers=min(num_workers, len(chunks)),
            generator=torch.Generator(),
            collate_fn=_unchanged,
        )
    )


def _unchanged(result: Any) -> Any:
    return result


class _Calls(Dataset[Any], Generic[Result]):
    """Results of a function by chunk. A UserError is a result; raised in a worker, it would become a traceback."""

    def __init__(self, function: Callable[[np.ndarray], Result], chunks: list[np.ndarray]) -> None:
        self._function, self._chunks = function, chunks

    def __getitem__(self, number: int) -> Result | UserError:
        if number >= len(self._chunks):
            raise IndexError
        try:
            return self._function(self._chunks[number])
        except UserError as error:
            return error

    def __len__(self) -> int:
        return len(self._chunks)
