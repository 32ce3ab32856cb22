"""The one module that is trained: the student and every learned projector, so that one DDP wrapper owns all of it.

The teacher is no part of it: it would be saved in each checkpoint, switched by train() and broadcast by DDP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kd_accel.models.taps import TapRecorder
from kd_accel.stages import stage

Pairs = dict[str, tuple[Tensor, Tensor]]


class StudentModule(nn.Module):
    """Student network with its input normalization and the learned projectors of its features.

    Args:
        student: plain network.
        normalize: module from uint8 pixels to the input of the network.
        taps: named modules of the network whose outputs are paired with the teacher's features.
        student_projectors: projectors of those outputs by tap; a tap without one is compared as it is.
    """

    def __init__(
        self,
        student: nn.Module,
        normalize: nn.Module,
        *,
        taps: Sequence[str] = (),
        student_projectors: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.normalize = normalize
        self._taps = tuple(taps)
        self.student_projectors = nn.ModuleDict({_key(tap): part for tap, part in (student_projectors or {}).items()})
        self._recorder = TapRecorder(student, self._taps)

    def open_taps(self) -> None:
        """Start recording; `close_taps` must follow."""
        self._recorder.open()

    def close_taps(self) -> None:
        self._recorder.close()

    def forward(self, images: Tensor, teacher_features: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Pairs]:
        """uint8 images [B, 3, H, W] -> (logits [B, C], {tap: (student map, target map)} where features were given)."""
        logits = self.student(self.normalize(images))
        recorded = self._recorder.take()
        if teacher_features is None:
            return logits, {}
        with stage("projector"):
            return logits, {tap: self._pair(tap, recorded[tap], teacher_features[tap]) for tap in self._taps}

    def _pair(self, tap: str, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        key = _key(tap)
        if key in self.student_projectors:
            student = self.student_projectors[key](student)
        return student, target


def _key(tap: str) -> str:
    """A ModuleDict takes no dots."""
    return tap.replace(".", "/")
