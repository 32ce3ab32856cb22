"""Forward of a live teacher as a CUDA graph, for a cache build, in which nothing else keeps the GPU busy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from kd_accel.errors import describe_error
from kd_accel.models.cuda_graphs import capture
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.types import Batch, TeacherOutput


class GraphedTeacher:
    """Live teacher on a GPU, whose forward is recorded in the first call and replayed from then on.

    The output is overwritten by the next call. Batches of another shape than the first one's run without the graph.

    Args:
        live: The teacher, on the current device.
        say: Function that prints a line, if the forward cannot be captured.
    """

    def __init__(self, live: LiveTeacher, say: Callable[[str], None]) -> None:
        self._live, self._say = live, say
        self._batch: Batch | None = None
        self._replay: Callable[[], TeacherOutput] | None = None

    def __call__(self, batch: Batch) -> TeacherOutput:
        """Compute logits and targets for a batch on the teacher's device; see `LiveTeacher.finish`."""
        if self._batch is None:
            self._batch = replace(batch, images=batch.images.clone())
            self._replay = self._captured(self._batch)
        images = self._batch.images
        if self._replay is None or (images.shape, images.dtype) != (batch.images.shape, batch.images.dtype):
            return self._live(batch)
        images.copy_(batch.images, non_blocking=True)
        return self._replay()

    def _captured(self, batch: Batch) -> Callable[[], TeacherOutput] | None:
        try:
            return capture(lambda: self._live(batch), batch.images.device)
        except RuntimeError as error:
            self._say(f"teacher: the forward cannot be captured as a CUDA graph ({describe_error(error)}), so it is slower")
            return None
