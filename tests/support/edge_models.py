"""Models and data sources of a user with a rare property, for `import:tests.support.edge_models:...`."""

import os

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.models import SmallNet


class TiedNet(SmallNet):
    """Network whose classifier and embedding of the classes are one parameter under two names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, width=8, norm=True, dropout=0.2)
        self.codes = nn.Embedding(num_classes, 16, _weight=self.fc.weight)
        self.codes.weight = self.fc.weight

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer2(self.layer1(images)).mean((2, 3))
        return self.fc(self.dropout(features + self.codes.weight.mean(0)))


def tied(num_classes: int) -> nn.Module:
    return TiedNet(num_classes)


def images_of_a_rare_class(split: str, image_size: int) -> dict[str, object]:
    """Create 555 training samples in the order KD_TEST_ORDER, of which five are of the last class, and 12 test samples."""
    counts = {"train": (300, 250, 5), "test": (4, 4, 4)}[split]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    order = np.random.default_rng(int(os.environ["KD_TEST_ORDER"])).permutation(len(labels))
    pixels = np.random.default_rng(sum(counts)).integers(0, 256, (len(labels), image_size, image_size, 3), dtype=np.uint8)
    return {"images": pixels, "labels": labels.numpy()[order].tolist(), "label_names": ["cat", "dog", "owl"]}
