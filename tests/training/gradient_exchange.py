"""A program for two processes: the gradients of each rank before and after the exchange, written to a directory.

The last micro-batch's backward exchanges; those before it, inside `no_sync`, do not.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from kd_accel.distributed import start_processes
from kd_accel.losses.distiller import DistillationLoss
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_layers
from kd_accel.models.preprocess import Normalize
from kd_accel.models.projectors import build_projectors
from kd_accel.models.student import StudentModule
from kd_accel.teacher.teacher import LiveTeacher
from kd_accel.training.trainer import train_step
from kd_accel.types import Batch


def gradients(module, moment):
    return {f"{moment}|{name}": parameter.grad.clone() for name, parameter in module.named_parameters()}


def main(directory):
    accelerator = start_processes("no")
    student = build_model("import:tests.own_models:student", num_classes=4)
    network = build_model("import:tests.own_models:teacher", num_classes=4, seed=1)
    layers = ["layer1", "layer2"]
    shapes = [probe_layers(model, layers, image_size=32) for model in (student, network)]
    projectors = build_projectors(*shapes, direction="student_to_teacher")
    normalize = Normalize([0.5] * 3, [0.25] * 3)
    teacher = LiveTeacher(network, normalize, layers={layer: layer for layer in layers})
    module = StudentModule(student, normalize, layers=layers, student_projectors=projectors.student)
    module.start_recording()
    prepared = accelerator.prepare(module)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    images = torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8)
    batch = Batch(images, torch.arange(8) % 4, torch.arange(8), 0)
    loss = DistillationLoss(temperature=2.0, alpha=0.5, feature_weight=0.1)
    with accelerator.no_sync(prepared):
        accelerator.backward(train_step(prepared, teacher, loss, batch)[0].total)
    found = gradients(module, "before")
    accelerator.backward(train_step(prepared, teacher, loss, batch)[0].total)
    found |= gradients(module, "after")
    save_file(found, Path(directory) / f"rank{accelerator.process_index}.safetensors")
    module.stop_recording()
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
