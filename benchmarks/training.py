"""What a training step costs beside a bare PyTorch loop: `python -m benchmarks.training --suite quick`.

Both sides train the same student (ResNet-18, ImageNet stem, 10 classes, 32x32, batch 128, channels_last, fused SGD with
Nesterov momentum). `bare` is a loop over normalised float tensors that lie in memory: nothing but forward, backward and
step. `plain` is this program's whole path: order of the rows, views (crop_flip), loading, normalisation, loss, metrics,
learning rate, the line of metrics at the end of a block. One unit is an image; a block is an epoch of a few steps; the two take
turns. Images are random, since nothing here depends on what they show.

Run it alone: on two cores any other load shows.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torchvision.models import resnet18

from benchmarks.harness import Result, finish, measure_in_turns
from kd_accel.commands.course import build_course
from kd_accel.config import CheckpointConfig, DataConfig, OptimConfig, RunConfig, TrainConfig
from kd_accel.data.loader import TrainLoader
from kd_accel.data.sources import MemoryImages
from kd_accel.data.views import ViewFunction
from kd_accel.engine.interruption import Interruption
from kd_accel.engine.journal import Journal
from kd_accel.engine.meters import Meters
from kd_accel.engine.optim import build_optimizer
from kd_accel.engine.progress import Progress
from kd_accel.engine.setup import start_processes
from kd_accel.engine.state import Trainee
from kd_accel.engine.train import Job, train_epoch
from kd_accel.models.preprocess import Normalize
from kd_accel.models.student import StudentModule
from kd_accel.models.zoo import build_model
from kd_accel.types import no_signals

BATCH_SIZE = 128
STEPS_PER_BLOCK = 8
CLASSES = 10
OPTIM = OptimConfig(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
MEAN, STD = [0.5] * 3, [0.25] * 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=["quick"], default="quick", help="quick: plain student against the bare loop")
    parser.add_argument("--repeats", type=int, default=9, help="blocks of each case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; several of them wait for each other")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        cases = {"bare": bare_case(), "plain": plain_case(Path(directory), repeats=arguments.repeats + 2)}
        rates = measure_in_turns(cases, repeats=arguments.repeats)
    result = Result(f"training-{arguments.suite}", rates, notes={"batch_size": BATCH_SIZE, "steps_per_block": STEPS_PER_BLOCK})
    result.add_ratio("plain", "bare")
    finish(result)


def bare_case() -> Callable[[], float]:
    """A loop that anybody would write who wants to know what the hardware gives."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = resnet18(num_classes=CLASSES).to(device).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=OPTIM.lr, momentum=OPTIM.momentum, nesterov=True, weight_decay=OPTIM.weight_decay, fused=True
    )
    images = torch.randn(STEPS_PER_BLOCK, BATCH_SIZE, 3, 32, 32, device=device)
    labels = torch.randint(0, CLASSES, (STEPS_PER_BLOCK, BATCH_SIZE), device=device)
    batches = [batch.contiguous(memory_format=torch.channels_last) for batch in images]

    def block() -> float:
        for batch, target in zip(batches, labels, strict=True):
            functional.cross_entropy(model(batch), target).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return STEPS_PER_BLOCK * BATCH_SIZE

    return block


def plain_case(directory: Path, *, repeats: int) -> Callable[[], float]:
    """An epoch of the program's own loop."""
    job = plain_job(directory, epochs=repeats)

    def block() -> float:
        position = job.trainee.position
        train_epoch(job)
        position.epoch, position.step_in_epoch = position.epoch + 1, 0
        return STEPS_PER_BLOCK * BATCH_SIZE

    return block


def plain_job(directory: Path, *, epochs: int) -> Job:
    """A plain training of as many epochs, without checkpoints and evaluation, on random images."""
    config = RunConfig(
        data=DataConfig(augment="crop_flip", val_fraction=0.0),
        optim=OPTIM,
        train=TrainConfig(epochs=epochs, batch_size=BATCH_SIZE),
        checkpoint=CheckpointConfig(every_epochs=None),
    )
    accelerator = start_processes("no")
    network = build_model("torchvision/resnet18", num_classes=CLASSES)
    module = StudentModule(network, Normalize(MEAN, STD)).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(module.to(accelerator.device).parameters(), config.optim)
    module, optimizer = accelerator.prepare(module, optimizer)
    loader = _loader(config, accelerator.device)
    return Job(
        accelerator=accelerator,
        train=config.train,
        checkpoint=config.checkpoint,
        trainee=Trainee(module, optimizer, Meters(accelerator.device)),
        loader=loader,
        signals=no_signals,
        course=build_course(config, steps_per_epoch=loader.steps_per_epoch),
        journal=Journal(directory / "metrics.jsonl", is_main=True),
        progress=Progress("plain", total_steps=epochs * STEPS_PER_BLOCK, done_steps=0, is_main=False),
        interruption=Interruption(accelerator),
        checkpoint_dir=directory / "checkpoints",
        checkpoint_extra={},
        checkpoint_tensors={},
    )


def _loader(config: RunConfig, device: torch.device) -> TrainLoader:
    generator = np.random.default_rng(0)
    rows = STEPS_PER_BLOCK * BATCH_SIZE
    pixels = generator.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)
    labels = generator.integers(0, CLASSES, rows)
    images = MemoryImages(pixels, labels, [str(label) for label in range(CLASSES)])
    stored = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device) if device.type == "cuda" else None
    views = ViewFunction("crop_flip", 32)
    return TrainLoader(images, views, rows=np.arange(rows), batch_size=config.train.batch_size, device_images=stored)


if __name__ == "__main__":
    main()
