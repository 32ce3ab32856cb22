"""Program for two processes that trains a small student on the digits with each registered loss in turn.

    accelerate launch --config_file launch/cpu2.yaml -m tests.support.all_methods DIRECTORY

A training has four steps of two processes with two micro-batches of four samples. It is made with a live teacher, from the
caches that `build_caches` has written to DIRECTORY, and from a cache with a stop after two steps. Each rank writes the losses
of its micro-batches, the weights after each step, and the last state of the trained module.
tests/training/test_all_methods.py compares them with each other, and with steps of its own.
"""

import sys
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from kd_accel.cache.teacher_cache import TeacherCache
from kd_accel.config.schema import CheckpointConfig, OptimConfig
from kd_accel.data.transforms import CropFlip
from kd_accel.data.views import ImageDataset, ViewDataset
from kd_accel.distributed import leave_processes, start_processes
from kd_accel.exit_codes import exit_codes
from kd_accel.losses.distiller import Distiller, LossWeights
from kd_accel.losses.registry import load_loss, names
from kd_accel.losses.targets import build_target
from kd_accel.models.factory import build_model
from kd_accel.models.feature_extractor import probe_layers
from kd_accel.teacher.teacher import LiveTeacher, Teacher
from kd_accel.training.checkpoint import load_checkpoint
from kd_accel.training.metrics import Meters
from kd_accel.training.nonfinite import NonFiniteGuard
from kd_accel.training.optim import build_optimizer
from kd_accel.training.saving import CheckpointSaver
from kd_accel.training.state import TrainState, restore, wrap_for_training
from kd_accel.training.step import TrainStep
from kd_accel.types import TeacherOutput

LAYER, IMAGE_SIZE = "layer2", 32
STEPS, STOP_AFTER = 4, 2
BATCH, RANKS, ACCUMULATION = 16, 2, 2
MICRO_BATCH = BATCH // (RANKS * ACCUMULATION)
OPTIM = OptimConfig(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0)
STATISTICS = {"mean": [0.5] * 3, "std": [0.25] * 3}
LOSSES = [*((kind, name) for kind in ("logits", "features") for name in names(kind))]
SETTINGS = {"mse": {"direction": "student_to_teacher"}, "crd": {"feat_dim": 8, "nce_k": 50}}
"""Settings of feature losses other than the default: a PCA would be fitted."""
WEIGHTS = LossWeights(features={"mgd": 1e-2, "crd": 0.1, "rkd": 0.1})


@cache
def views():
    data = ImageDataset("digits", image_size=IMAGE_SIZE, limit_train=80)
    return ViewDataset(data, CropFlip(IMAGE_SIZE), num_views=1)


def loader(rank=0, world_size=1, grad_accum_steps=1):
    return views().module.train_loader(
        batch_size=BATCH, rank=rank, world_size=world_size, grad_accum_steps=grad_accum_steps, seed=3
    )


@cache
def teacher():
    network = build_model("import:tests.support.models:teacher", num_classes=10, seed=1)
    return Teacher(network, **STATISTICS)


def loss_of(kind, name):
    return load_loss(kind, name)(**(SETTINGS.get(name, {}) if kind == "features" else {}))


def target_function(kind, name):
    """Return the target function of a loss; that of a logit loss has no effect."""
    own, theirs = (
        probe_layers(build_model(f"import:tests.support.models:{arch}", num_classes=10), [LAYER], image_size=IMAGE_SIZE)[LAYER]
        for arch in ("student", "teacher")
    )
    return loss_of(kind, name).target_function(own, theirs) if kind == "features" else build_target({"name": "mean"})


def cache_directory(directory, kind, name):
    return Path(directory) / f"cache-{target_function(kind, name).description()['name']}"


def build_caches(directory):
    """Build a cache for each target function, with the batches of a process."""
    for kind, name in LOSSES:
        own = cache_directory(directory, kind, name)
        if not own.exists():
            layers = {LAYER: target_function(kind, name)}
            TeacherCache.build(own, teacher(), views(), layers=layers, dtype="float32", batch_size=MICRO_BATCH)


def cached(directory, kind, name):
    """Return the source of stored outputs, in float64."""
    stored = TeacherCache.open(cache_directory(directory, kind, name))
    return lambda batch: in_float64(stored.read(batch.index, batch.view))


def live(kind, name):
    """Return the source of a live teacher, in float64."""
    target = target_function(kind, name)
    network, normalize = teacher().on_device(torch.device("cpu"), layers=[LAYER], image_size=IMAGE_SIZE)
    source = LiveTeacher(network, normalize, targets={LAYER: target})
    return lambda batch: in_float64(source(batch))


def in_float64(output):
    return TeacherOutput(output.logits.double(), {layer: feature.double() for layer, feature in output.features.items()})


def build_distiller(kind, name):
    student = build_model("import:tests.support.models:student", num_classes=10)
    loss = loss_of(kind, name)
    if kind == "logits":
        return Distiller(student, **STATISTICS, logits=loss).double()
    loss.set_samples(torch.from_numpy(views().module.training_samples))
    theirs = probe_layers(teacher().network, [LAYER], image_size=IMAGE_SIZE)[LAYER]
    shapes = {LAYER: target_function(kind, name).output_shape(theirs)}
    distiller = Distiller(student, **STATISTICS, features={name: loss}, layers={LAYER: LAYER}, target_shapes=shapes)
    distiller.start_recording()
    return distiller.double()


def weights_of(kind, name):
    return LossWeights(features={name: WEIGHTS.features.get(name, 1.0)}) if kind == "features" else LossWeights()


class Training:
    """Training of this process, whose parts are those of `kd-accel train`."""

    def __init__(self, accelerator, kind, name, source):
        self.accelerator, self.weights, self.found, losses = accelerator, weights_of(kind, name), {}, []
        self.distiller, self.losses = build_distiller(kind, name).train(), losses
        self.distiller.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.detach()))
        module, optimizer = wrap_for_training(accelerator, self.distiller, build_optimizer(self.distiller.parameters(), OPTIM))
        meters = Meters(accelerator.device, terms=self.distiller.term_names, has_teacher=True)
        self.state = TrainState(module, optimizer, meters)
        self.step = TrainStep(accelerator, self.state, source, NonFiniteGuard(accelerator, module, optimizer))

    def run(self, *, stop_after=STEPS):
        done = self.state.position.step
        batches = loader(self.accelerator.process_index, RANKS, ACCUMULATION).epoch(0, start_step=done)
        for number in range(done, stop_after):
            self.step(next(batches), self.weights, OPTIM.lr)
            self.state.position.step += 1
            self.found |= {
                f"step{number}|{name}": weight.detach().clone() for name, weight in self.distiller.named_parameters()
            }
        return self

    def tensors(self):
        state = {f"state|{name}": tensor.clone() for name, tensor in self.distiller.state_dict().items()}
        return {**self.found, **state, "losses": torch.stack(self.losses)}


def resumed(accelerator, kind, name, source, directory):
    """Train for some steps, save a checkpoint, and continue from it with a new module."""
    first = Training(accelerator, kind, name, source).run(stop_after=STOP_AFTER)
    saver = CheckpointSaver(accelerator, Path(directory) / "checkpoints" / f"{kind}-{name}", CheckpointConfig())
    saver.save(first.state, metrics_bytes=0)
    saver.wait()
    second = Training(accelerator, kind, name, source)
    (path,) = saver.directory.glob("step-*")
    restore(second.state, load_checkpoint(path), accelerator)
    second.losses[:], second.found = first.losses, first.found
    return second.run()


def main(directory):
    torch.set_num_threads(1)
    accelerator, found = start_processes("float32"), {}
    for kind, name in LOSSES:
        stored = cached(directory, kind, name)
        trainings = {
            "live": Training(accelerator, kind, name, live(kind, name)).run(),
            "cached": Training(accelerator, kind, name, stored).run(),
            "resumed": resumed(accelerator, kind, name, stored, directory),
        }
        for way, training in trainings.items():
            found |= {f"{kind}|{name}|{way}|{key}": tensor for key, tensor in training.tensors().items()}
    save_file(found, Path(directory) / f"rank{accelerator.process_index}.safetensors")
    leave_processes(accelerator)


if __name__ == "__main__":
    # At the interpreter's own exit, a thread of gloo that still runs can abort the process.
    with exit_codes():
        main(sys.argv[1])
