"""Hybrid distillation with torchdistill 1.1.5, run by `benchmarks.peers` in the environment of torchdistill.

The usage follows the documentation (https://yoshitomo-matsubara.net/torchdistill/): a DistillationBox built from a config,
forward hooks on both models, an auxiliary wrapper with a 1x1 convolution at each layer of the student, KDLoss and MSELoss as
terms of a WeightedSumLoss, a DataLoader of PIL images with torchvision transforms, and the loop of the examples (forward
process, post-forward process, a logger that receives the loss after each step).

Each line on stdin starts an epoch, after which the process prints {"images": number, "seconds": time} as a line of JSON. The
first printed line has the versions. The script does not import kd_accel, which is not installed in that environment.
"""

from __future__ import annotations

import json
import math
import sys
import time
from typing import Any

import numpy as np
import torch
import torchdistill
from PIL import Image
from torch.utils.data import Dataset, RandomSampler
from torchdistill.core.distillation import get_distillation_box
from torchdistill.misc.log import MetricLogger, SmoothedValue
from torchvision import models, transforms

WIDTHS = {"layer1": (64, 256), "layer2": (128, 512), "layer3": (256, 1024), "layer4": (512, 2048)}
"""{layer: (channels of the student, channels of the teacher)}."""


class PilImages(Dataset[Any]):
    """Random PIL images in memory, transformed at each access, like torchvision's CIFAR10."""

    def __init__(self, samples: int, size: int, classes: int, transform: Any) -> None:
        generator = np.random.default_rng(0)
        pixels = generator.integers(0, 256, (samples, size, size, 3), dtype=np.uint8)
        self.images = [Image.fromarray(image) for image in pixels]
        self.labels, self.transform = generator.integers(0, classes, samples).tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def main() -> None:
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.benchmark = True  # as in a training of kd_accel
    torch.manual_seed(0)
    box = build_box(settings)
    student, teacher = box.student_model, box.teacher_model
    before = [weight.detach().clone() for weight in student.parameters()]
    logger = MetricLogger(delimiter="  ")
    logger.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    loss, _ = epoch(box, 0, logger)
    assert math.isfinite(loss) and not teacher.training and student.training
    assert all(not torch.equal(weight, old) for weight, old in zip(student.parameters(), before, strict=True)), (
        "a parameter was not trained"
    )
    assert len(box.criterion.term_dict) == 1 + len(WIDTHS)
    print(json.dumps({"torchdistill": torchdistill.__version__, "torch": torch.__version__, "loss": loss}), flush=True)
    for number, _ in enumerate(sys.stdin, start=1):
        started_at = time.perf_counter()
        _, images = epoch(box, number, logger)
        print(json.dumps({"images": images, "seconds": time.perf_counter() - started_at}), flush=True)


def epoch(box: Any, number: int, logger: MetricLogger) -> tuple[float, int]:
    """Run an epoch; return (loss of the last step, number of images)."""
    box.pre_epoch_process(epoch=number)
    value, images = math.nan, 0
    for batch, targets, supplement in box.train_data_loader:
        loss = box.forward_process(batch, targets, supplement)
        box.post_forward_process(loss=loss)
        value = loss.item()
        logger.update(loss=value, lr=box.optimizer.param_groups[0]["lr"])
        images += len(batch)
    box.post_epoch_process()
    return value, images


def build_box(settings: dict[str, Any]) -> Any:
    """Build a DistillationBox on random images."""
    transform = transforms.Compose(
        [
            transforms.RandomCrop(settings["image_size"], padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(settings["mean"], settings["std"]),
        ]
    )
    data = PilImages(settings["samples"], settings["image_size"], settings["classes"], transform)
    teacher = models.resnet50(num_classes=settings["classes"], zero_init_residual=True)
    teacher.eval()
    student = models.resnet18(num_classes=settings["classes"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return get_distillation_box(teacher, student, {"train": data}, train_config(settings), device, None, False, 1)


def train_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings as a config of torchdistill."""
    layers = list(WIDTHS)
    connectors = {
        f"connector_{layer}": {
            "conv2d_kwargs": {"in_channels": narrow, "out_channels": wide, "kernel_size": 1},
            "io": "output",
            "path": f"student_model.{layer}",
        }
        for layer, (narrow, wide) in WIDTHS.items()
    }
    connected = [f"connector_dict.connector_{layer}" for layer in layers]
    return {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": {
                "batch_size": settings["batch_size"],
                "num_workers": settings["workers"],
                "persistent_workers": settings["workers"] > 0,
                "drop_last": True,
            },
        },
        "teacher": {"forward_proc": "forward_batch_only", "forward_hook": {"output": [*layers, "fc"]}, "requires_grad": False},
        "student": {
            "forward_proc": "forward_batch_only",
            "auxiliary_model_wrapper": {"key": "Connector4DAB", "kwargs": {"connectors": connectors}},
            "forward_hook": {"output": [*(f"student_model.{layer}" for layer in layers), *connected, "student_model.fc"]},
        },
        "optimizer": {"key": "SGD", "kwargs": settings["sgd"]},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": _terms(settings)}},
    }


def _terms(settings: dict[str, Any]) -> dict[str, Any]:
    paths = {"student_module_path": "student_model.fc", "teacher_module_path": "fc"}
    paths |= {"student_module_io": "output", "teacher_module_io": "output"}
    kd = {"key": "KDLoss", "kwargs": {**paths, "temperature": settings["temperature"], "alpha": 1 - settings["alpha"]}}
    terms: dict[str, Any] = {"kd": {"criterion": kd, "weight": 1.0}}
    for layer in WIDTHS:
        sides = {
            "input": {"is_from_teacher": False, "module_path": f"connector_dict.connector_{layer}", "io": "output"},
            "target": {"is_from_teacher": True, "module_path": layer, "io": "output"},
        }
        terms[layer] = {
            "criterion": {"key": "MSELoss", "kwargs": {}},
            "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": sides},
            "weight": settings["feature_weight"],
        }
    return terms


if __name__ == "__main__":
    main()
