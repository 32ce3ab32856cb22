"""Distillation in a training loop of your own, in plain PyTorch, from a cache of the teacher's outputs.

    python examples/own_loop.py --teacher runs/digits/teacher --epochs 3
    accelerate launch --config_file launch/cpu2.yaml examples/own_loop.py --teacher runs/digits/teacher --epochs 3

On a CPU, the trained weights are equal, byte for byte, to those of `kd-accel train` with the same settings.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import kd_accel as kd

IMAGE_SIZE, BATCH_SIZE, VIEWS, PEAK_LR = 32, 64, 2, 0.05
LAYERS = ["layer3", "layer4"]


def main() -> None:
    """Train a student on the cached outputs of a teacher, and save its weights."""
    arguments = parse_arguments()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    device = accelerator.device

    # Data: training samples, and augmented views of them that are functions of (view_seed, view, index).
    data = kd.ImageDataset("digits", image_size=IMAGE_SIZE, limit_train=arguments.limit_train)
    views = kd.ViewDataset(data, transform=kd.transforms.Crop(IMAGE_SIZE), num_views=VIEWS, view_seed=0)
    sampler = kd.EpochBatchSampler(
        views, batch_size=BATCH_SIZE, seed=0, rank=accelerator.process_index, world_size=accelerator.num_processes
    )
    batches = DataLoader(views, batch_sampler=sampler)

    student = build_student(num_classes=len(data.class_names))
    kd.use_cpu_kernels(student, device)  # faster kernels on a CPU, as in `kd-accel train`; no effect on a GPU

    # Teacher: it runs once over all views. Later starts reuse the cache on the disk.
    teacher = kd.Teacher.from_run(arguments.teacher)
    cache = kd.TeacherCache.build(
        arguments.cache,
        teacher,
        views,
        layers={layer: kd.targets.Identity() for layer in LAYERS},
        dtype="float32",
        batch_size=BATCH_SIZE,
    )

    # Student and losses are one module, with one optimizer, one DDP wrapper and one state dict.
    distiller = build_distiller(student, data, cache)
    distiller.to(device).train()
    distiller.start_recording()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, fused=True)
    module, optimizer = accelerator.prepare(distiller, optimizer)

    total_steps, step = arguments.epochs * len(sampler), 0
    for epoch in range(arguments.epochs):
        views.set_epoch(epoch)
        sampler.set_epoch(epoch)
        weights = kd.LossWeights(temperature=4.0, alpha=max(0.5, 0.9 * 0.95**epoch), features={"mse": 0.1})
        for batch in batches:
            target = cache.read(batch["index"], views.view, device=device)
            output = module(batch["image"].to(device), target, batch["label"].to(device), weights)
            accelerator.backward(output.loss)
            for group in optimizer.param_groups:
                group["lr"] = cosine(PEAK_LR, step, total_steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
        accelerator.print(f"epoch {epoch + 1}: loss {output.loss.item():.4f}")
    distiller.stop_recording()
    if accelerator.is_main_process:
        save_file({name: tensor.contiguous() for name, tensor in student.state_dict().items()}, arguments.out)
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--teacher", required=True, help="run directory of the teacher")
    options.add_argument("--cache", default="caches/own-loop", help="directory of the cache")
    options.add_argument("--epochs", type=int, default=3, help="number of epochs")
    options.add_argument("--limit_train", type=int, default=None, help="number of training samples to use, by default all")
    options.add_argument("--out", type=Path, default=Path("own_loop.safetensors"), help="file of the student's weights")
    return options.parse_args()


def build_distiller(student: torch.nn.Module, data: kd.ImageDataset, cache: kd.TeacherCache) -> kd.Distiller:
    """Combine the student, a logit loss, and a feature loss with learned projectors in one module."""
    return kd.Distiller(
        student,
        mean=data.mean,
        std=data.std,
        logits=kd.losses.KL(),
        features={"mse": kd.losses.MSE(direction="student_to_teacher")},
        layers={layer: layer for layer in LAYERS},
        target_shapes=cache.shapes,
        image_size=IMAGE_SIZE,
    )


def build_student(num_classes: int) -> torch.nn.Module:
    """Build a ResNet-18 with initial weights from seed 0."""
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=num_classes)


def cosine(peak: float, step: int, total_steps: int) -> float:
    """Compute the learning rate of a step: half a period of a cosine, from the peak to 0."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / total_steps))


if __name__ == "__main__":
    main()
