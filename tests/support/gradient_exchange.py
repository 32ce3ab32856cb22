"""Program for two processes that writes the gradients of each rank, before and after their exchange, to a directory.

The backward pass of the last micro-batch exchanges gradients. The passes before it, inside `no_sync`, do not.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from kd_accel.distributed import leave_processes, start_processes
from kd_accel.exit_codes import exit_codes
from kd_accel.losses.distiller import Distiller, LossWeights
from kd_accel.losses.features import MSE
from kd_accel.losses.logits import KL
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.teacher.teacher import LiveTeacher, raw_targets
from kd_accel.types import Batch

LAYERS = ["layer1", "layer2"]
WEIGHTS = LossWeights(temperature=2.0, alpha=0.5, features={"mse": 0.1})


def gradients(module, moment):
    return {f"{moment}|{name}": parameter.grad.clone() for name, parameter in module.named_parameters()}


def main(directory):
    accelerator = start_processes("float32")
    student = build_model("import:tests.support.models:student", num_classes=4)
    network = build_model("import:tests.support.models:teacher", num_classes=4, seed=1)
    distiller = Distiller(
        student,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        logits=KL(),
        features={"mse": MSE(direction="student_to_teacher")},
        layers={layer: layer for layer in LAYERS},
        target_shapes=probe_layers(network, LAYERS, image_size=32),
    )
    teacher = LiveTeacher(network, Normalize([0.5] * 3, [0.25] * 3), targets=raw_targets(LAYERS))
    distiller.start_recording()
    prepared = accelerator.prepare(distiller)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    batch = Batch(images, torch.arange(8) % 4, torch.arange(8), 0)
    with accelerator.no_sync(prepared):
        accelerator.backward(prepared(batch.images, teacher(batch), batch.labels, WEIGHTS).loss)
    found = gradients(distiller, "before")
    accelerator.backward(prepared(batch.images, teacher(batch), batch.labels, WEIGHTS).loss)
    found |= gradients(distiller, "after")
    save_file(found, Path(directory) / f"rank{accelerator.process_index}.safetensors")
    distiller.stop_recording()
    teacher.close()
    leave_processes(accelerator)


if __name__ == "__main__":
    # At the interpreter's own exit, a thread of gloo that still runs can abort the process.
    with exit_codes():
        main(sys.argv[1])
