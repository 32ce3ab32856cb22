"""The one module that is trained: the student and every learned projector, so that one DDP wrapper owns all of it.

The teacher is no part of it: it would be saved in each checkpoint, switched by train() and broadcast by DDP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.profiling import profiler_range

Pairs = dict[str, tuple[Tensor, Tensor]]


class StudentModule(nn.Module):
    """Student network with its input normalization and the learned projectors of its features.

    Args:
        student: plain network.
        normalize: module from uint8 pixels to the input of the network.
        layers: named modules of the network whose outputs are paired with the teacher's features.
        student_projectors: projectors of those outputs by layer; a layer without one is compared as it is.
    """

    def __init__(
        self,
        student: nn.Module,
        normalize: nn.Module,
        *,
        layers: Sequence[str] = (),
        student_projectors: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.normalize = normalize
        self._layers = tuple(layers)
        self.student_projectors = nn.ModuleDict({_key(layer): part for layer, part in (student_projectors or {}).items()})
        self._recorder = FeatureExtractor(student, self._layers)

    def start_recording(self) -> None:
        """Start recording; `stop_recording` must follow."""
        self._recorder.open()

    def stop_recording(self) -> None:
        self._recorder.close()

    def forward(self, images: Tensor, teacher_features: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Pairs]:
        """uint8 images [B, 3, H, W] -> (logits [B, C], {layer: (student map, target map)} where features were given)."""
        logits = self.student(self.normalize(images))
        recorded = self._recorder.take()
        if teacher_features is None:
            return logits, {}
        with profiler_range("projector"):
            return logits, {layer: self._pair(layer, recorded[layer], teacher_features[layer]) for layer in self._layers}

    def _pair(self, layer: str, student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        key = _key(layer)
        if key in self.student_projectors:
            student = self.student_projectors[key](student)
        return student, target


def _key(layer: str) -> str:
    """A ModuleDict takes no dots."""
    return layer.replace(".", "/")
