"""First training step of ResNet-18 on the digits without kd_accel: `accelerate launch -m benchmarks.startup_bare 128 FILE`.

Each process takes its share of the batch of 128; rank 0 writes FILE after the step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn import functional
from torchvision.models import resnet18

FIRST_STEP = "first_step"


def main() -> None:
    batch_size, first_step = int(sys.argv[1]), Path(sys.argv[2])
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    share = batch_size // accelerator.num_processes
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels[:share]).float().view(-1, 1, 8, 8) / 16
    images = functional.interpolate(images, size=32).expand(-1, 3, -1, -1).contiguous()
    model = resnet18(num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    targets = torch.from_numpy(labels[:share]).to(accelerator.device)
    accelerator.backward(functional.cross_entropy(model(images.to(accelerator.device)), targets))
    optimizer.step()
    if accelerator.is_main_process:
        first_step.write_text("done")
    accelerator.end_training()


if __name__ == "__main__":
    main()
