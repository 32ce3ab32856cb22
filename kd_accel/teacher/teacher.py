"""A teacher that answers for each batch as it comes, and cannot be changed by the training around it.

It stays outside the wrapped module, so that it is in no checkpoint and no DDP broadcast touches its buffers. `no_grad` and not
`inference_mode`: tensors made under the latter cannot enter a loss that a trainable projector takes part in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn

from kd_accel.io.hashing import tensors_digest
from kd_accel.models.feature_extractor import FeatureExtractor
from kd_accel.types import Batch, TeacherOutput


@dataclass
class LiveTeacher:
    """Answers with logits and, for each layer, the raw or projected features.

    model: the teacher; put in evaluation mode and locked here. normalize: images uint8 -> what the model was trained on.
    layers: {student layer: teacher layer}; an open recorder of the teacher's layers is made of them and must be closed.
    projectors: frozen ones by student layer; where a layer has none its features are raw.
    autocast: the context in which the teacher runs; a cached teacher must have been built in the same.
    """

    model: nn.Module
    normalize: nn.Module
    layers: Mapping[str, str] = field(default_factory=dict)
    projectors: Mapping[str, nn.Module] = field(default_factory=dict)
    autocast: Callable[[], AbstractContextManager] = nullcontext

    def __post_init__(self) -> None:
        for module in (self.model, self.normalize, *self.projectors.values()):
            module.eval().requires_grad_(False)
        self._recorder = FeatureExtractor(self.model, list(self.layers.values()))
        self._recorder.open()
        self._locked = self.digest()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TeacherOutput:
        """Signals for uint8 images [B, 3, H, W] on the teacher's device."""
        if self.model.training:  # somebody called train() on it
            self.model.eval()
        with self.autocast():
            logits = self.model(self.normalize(batch.images))
            recorded = self._recorder.take()
            features = {layer: self._project(layer, recorded[name]) for layer, name in self.layers.items()}
        return TeacherOutput(logits.float(), features)

    def _project(self, layer: str, feature: torch.Tensor) -> torch.Tensor:
        return self.projectors[layer](feature) if layer in self.projectors else feature

    def digest(self) -> str:
        """Of weights and buffers."""
        return tensors_digest(self.model.state_dict())

    def check_unchanged(self) -> None:
        """Our own invariant: a training must not have touched the teacher."""
        assert self.digest() == self._locked, "the teacher's weights or buffers changed during the training"

    def close(self) -> None:
        self._recorder.close()
