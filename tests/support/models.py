"""Small models and data sources of a user, for `import:tests.support.models:...`."""

import contextlib
import os
import time

import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Network of two layers and a classifier, by default without BatchNorm, whose results depend on the parts of a batch."""

    def __init__(self, num_classes: int, *, width: int, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer1 = self._block(3, width, norm)
        self.layer2 = self._block(width, 2 * width, norm)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(2 * width, num_classes)

    @staticmethod
    def _block(channels_in: int, channels_out: int, norm: bool) -> nn.Sequential:
        layers = [nn.Conv2d(channels_in, channels_out, 3, stride=4, padding=1), nn.ReLU()]
        return nn.Sequential(*layers[:1], *([nn.BatchNorm2d(channels_out)] if norm else []), *layers[1:])

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer2(self.layer1(images.to(self.fc.weight.dtype)))
        return self.fc(self.dropout(features.mean((2, 3))))


def student(num_classes: int) -> nn.Module:
    return SmallNet(num_classes, width=8)


def student_float64(num_classes: int) -> nn.Module:
    return SmallNet(num_classes, width=8).double()


def student_with_everything(num_classes: int) -> nn.Module:
    """Build a network with BatchNorm and dropout, whose state a resume must restore."""
    return SmallNet(num_classes, width=8, norm=True, dropout=0.2)


def student_with_a_constant(num_classes: int) -> nn.Module:
    """Build `student_with_everything` with one more buffer, because of which ranks exchange their buffers in each step."""
    model = SmallNet(num_classes, width=8, norm=True, dropout=0.2)
    model.register_buffer("constant", torch.ones(1), persistent=False)
    return model


def teacher(num_classes: int) -> nn.Module:
    return SmallNet(num_classes, width=16, norm=True)


def teacher_float64(num_classes: int) -> nn.Module:
    return SmallNet(num_classes, width=16).double()


def with_an_idle_layer(num_classes: int) -> nn.Module:
    model = SmallNet(num_classes, width=8)
    model.idle = nn.Linear(2, 2)
    return model


class Undeterministic(SmallNet):
    """Network with an operator in its backward pass that has no deterministic kernel, not even on CPUs."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        at = torch.arange(logits.numel(), device=logits.device).view_as(logits)
        return torch.zeros_like(logits).put(at, logits) if self.training else logits


def undeterministic(num_classes: int) -> nn.Module:
    return Undeterministic(num_classes, width=8)


def without_a_classifier(num_classes: int) -> nn.Module:
    return nn.Conv2d(3, num_classes, 1)


def images(split: str, image_size: int) -> dict[str, object]:
    """Create noise around one mean color for each class, the same in every call."""
    seeds = {"train": int(os.environ.get("KD_TEST_NOISE_SEED", "1")), "test": 2, "val": 3}
    generator = torch.Generator().manual_seed(seeds[split])
    samples = {"train": 160, "test": 41, "val": 24}[split]
    labels = torch.arange(samples) % 4
    colors = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [150, 150, 40]])
    noise = torch.randint(-40, 40, (samples, image_size, image_size, 3), generator=generator)
    pixels = (colors[labels][:, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return {"images": pixels.numpy(), "labels": labels.tolist(), "label_names": ["red", "green", "blue", "olive"]}


def partly_labeled_images(split: str, image_size: int) -> dict[str, object]:
    """Remove the labels of four of seven training samples: -1 or None."""
    content = images(split, image_size)
    if split == "train":
        labels = enumerate(content["labels"])
        content["labels"] = [label if sample % 7 < 3 else (-1, None)[sample % 2] for sample, label in labels]
    return content


def imbalanced_images(split: str, image_size: int) -> dict[str, object]:
    """Leave 40, 20, 10 and 5 training samples of the classes."""
    content = images(split, image_size)
    if split == "train":
        kept = [sample for sample in range(160) if sample // 4 % 2 ** (sample % 4) == 0]
        content |= {"images": content["images"][kept], "labels": [content["labels"][sample] for sample in kept]}
    return content


def unlabeled_images(split: str, image_size: int) -> dict[str, object]:
    return {"images": images(split, image_size)["images"]}


def no_images(split: str, image_size: int) -> list[int]:
    return [1, 2, 3]


def odd_images(split: str, image_size: int) -> dict[str, object]:
    return {"images": torch.zeros(2, 8, 8).numpy(), "labels": [0, 1], "label_names": ["a", "b"]}


def wide_student(num_classes: int) -> nn.Module:
    return SmallNet(num_classes, width=12)


def swapped_images(split: str, image_size: int) -> dict[str, object]:
    """Exchange two training samples."""
    content = images(split, image_size)
    if split == "train":
        pixels, labels = content["images"].copy(), list(content["labels"])
        pixels[[3, 5]] = pixels[[5, 3]]
        labels[3], labels[5] = labels[5], labels[3]
        content |= {"images": pixels, "labels": labels}
    return content


def touched_images(split: str, image_size: int) -> dict[str, object]:
    """Change one channel of one pixel of one training sample by one."""
    content = images(split, image_size)
    pixels = content["images"].copy()
    pixels[5, 0, 0, 0] ^= 1
    return {**content, "images": pixels}


def relabelled_images(split: str, image_size: int) -> dict[str, object]:
    content = images(split, image_size)
    return {**content, "labels": [2 if sample == 5 else label for sample, label in enumerate(content["labels"])]}


class SlowNet(SmallNet):
    """Network whose forward takes KD_TEST_FORWARD_S longer."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("KD_TEST_FORWARD_S", "0")))
        return super().forward(images)


def slow_teacher(num_classes: int) -> nn.Module:
    return SlowNet(num_classes, width=16, norm=True)


def late_teacher(num_classes: int) -> nn.Module:
    """Build a teacher that takes KD_TEST_FORWARD_S longer for each batch of a cache build, only on rank 1."""

    def wait(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Smaller batches are not those of the build.
        if os.environ.get("RANK") == "1" and len(inputs[0]) >= 16:
            time.sleep(float(os.environ["KD_TEST_FORWARD_S"]))

    model = SmallNet(num_classes, width=16, norm=True)
    # A hook, because a sleep in `forward` would prevent the trace by which BatchNorm is fused.
    model.layer1[0].register_forward_pre_hook(wait)
    return model


class BreakingNet(SmallNet):
    """Network that fails in the steps KD_TEST_BREAKING_STEPS, counted in this process, only on rank KD_TEST_BREAKING_RANK.

    KD_TEST_BREAKS is `gradient` (NaN, with a finite loss), `logits` (NaN for the third sample of the batch), or `weights`
    (slightly changed).
    """

    forwards = 0

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        self.forwards += self.training
        steps = os.environ.get("KD_TEST_BREAKING_STEPS", "").split(",")
        rank = os.environ.get("RANK", "0")
        if not self.training or str(self.forwards) not in steps or os.environ.get("KD_TEST_BREAKING_RANK", rank) != rank:
            return logits
        match os.environ["KD_TEST_BREAKS"]:
            case "gradient":
                return logits + (0 * logits).sum().sqrt()
            case "logits":
                return logits.index_fill(0, torch.tensor([2]), torch.nan)
            case "weights":
                self.layer2[0].weight.data.add_(1e-6)
        return logits


class MortalNet(SmallNet):
    """Network with BatchNorm and dropout, and a fault at KD_TEST_AT.

    KD_TEST_AT is `train:5` (in the forward of this process's fifth step), or `eval:5` or `test:5` (in an evaluation of the
    validation samples, or of the 41 test samples, after the fifth step). KD_TEST_HAPPENS is the number of a signal that is sent
    to this process, or a file that is written until its disk is full.
    """

    # An attribute of the class, because the moving average is a copy of the network and must have the same count.
    steps = 0

    def forward(self, images: Tensor) -> Tensor:
        MortalNet.steps += self.training
        split = "train" if self.training else "test" if len(images) in (41, 21, 20) else "eval"
        # A forward of at most two images is one that probes the model.
        if os.environ.get("KD_TEST_AT") == f"{split}:{MortalNet.steps}" and len(images) > 2:
            self.happen(os.environ["KD_TEST_HAPPENS"])
        return super().forward(images)

    @staticmethod
    def happen(what: str) -> None:
        if what.isdecimal():
            os.kill(os.getpid(), int(what))
        else:
            with contextlib.suppress(OSError), open(what, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(512))


def mortal(num_classes: int) -> nn.Module:
    return MortalNet(num_classes, width=8, norm=True, dropout=0.2)


def breaking(num_classes: int) -> nn.Module:
    return BreakingNet(num_classes, width=8)


def images_without_olive(split: str, image_size: int) -> dict[str, object]:
    """Label the olive images red, so that half of the samples are red and a class is empty."""
    content = images(split, image_size)
    return {**content, "labels": [label % 3 for label in content["labels"]]}


def images_with_an_outlier(split: str, image_size: int) -> dict[str, object]:
    """Create images of little contrast, and a checkerboard, whose features are many times larger."""
    content = images(split, image_size)
    pixels = (content["images"] // 32 + 112).astype("uint8")
    pixels[0] = 0
    pixels[0, ::8] = pixels[0, 1::8] = pixels[0, 2::8] = pixels[0, 3::8] = 255
    return {**content, "images": pixels}


class NamedLogits(SmallNet):
    """Network whose second layer has the name of the logits in a cache."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, width=8)
        self.logits = self.layer2
        del self.layer2

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.logits(self.layer1(images)).mean((2, 3)))


def named_logits(num_classes: int) -> nn.Module:
    return NamedLogits(num_classes)


def olive_and_red_images(split: str, image_size: int) -> dict[str, object]:
    """Create the images of two of the four classes of `images`, in another order."""
    content = images(split, image_size)
    labels = torch.tensor(content["labels"])
    kept = (labels == 0) | (labels == 3)
    pixels = content["images"][kept.numpy()]
    return {"images": pixels, "labels": (labels[kept] == 0).long().tolist(), "label_names": ["olive", "red"]}
