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
    """student: plain network. normalize: pixels -> its input. Projectors by tap, for the side they stand on."""

    def __init__(
        self,
        student: nn.Module,
        normalize: nn.Module,
        *,
        taps: Sequence[str] = (),
        student_projectors: Mapping[str, nn.Module] | None = None,
        teacher_projectors: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.normalize = normalize
        self._taps = tuple(taps)
        self.student_projectors = _by_tap(student_projectors)
        self.teacher_projectors = _by_tap(teacher_projectors)
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
        if key in self.teacher_projectors:
            target = self.teacher_projectors[key](target)
        return student, target


def _by_tap(projectors: Mapping[str, nn.Module] | None) -> nn.ModuleDict:
    return nn.ModuleDict({_key(tap): projector for tap, projector in (projectors or {}).items()})


def _key(tap: str) -> str:
    """A ModuleDict takes no dots."""
    return tap.replace(".", "/")
