"""Distillation with the Trainer of Hugging Face transformers, from a cache of the teacher's outputs.

    pip install 'kd-accel[examples]'
    python examples/hf_trainer.py --teacher runs/digits/teacher --epochs 3

The trained model is a `Distiller`: student and losses in one module. Images and teacher outputs are both read by (index, view),
so they match for any order of the samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

import kd_accel as kd

IMAGE_SIZE, VIEWS = 32, 2


class DistillationTrainer(Trainer):
    """Trainer whose loss compares the student with cached outputs of the teacher.

    Args:
        cache: Cache of the teacher's outputs.
        weights: Temperature and weights of the loss.
        **options: Arguments of `Trainer`, whose model is a `Distiller`.
    """

    def __init__(self, cache: kd.TeacherCache, weights: kd.LossWeights, **options: Any) -> None:
        super().__init__(data_collator=default_collate, **options)
        self.cache, self.weights = cache, weights

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch of training views, or, in evaluation mode, of test images, which have one view."""
        position = {"view": inputs["view"]} if model.training else {"view": 0, "split": "test"}
        target = self.cache.read(inputs["index"], device=inputs["image"].device, **position)
        output = model(inputs["image"], target, inputs["label"], self.weights)
        return (output.loss, {"logits": output.logits}) if return_outputs else output.loss


class NextView(TrainerCallback):
    """Callback that sets the view of each epoch in the data set."""

    def __init__(self, views: kd.ViewDataset) -> None:
        self.views = views

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Set the view before the first batch of the epoch."""
        self.views.set_epoch(round(state.epoch))


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    """Compute the fraction of correct predictions."""
    return {"accuracy": float(np.mean(predicted.predictions.argmax(1) == predicted.label_ids))}


def main() -> None:
    """Build the cache, train and evaluate a student, and save its weights."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--teacher", required=True, help="run directory of the teacher")
    options.add_argument("--out", type=Path, default=Path("runs/hf_trainer"), help="directory of the results")
    options.add_argument("--epochs", type=int, default=3, help="number of epochs")
    options.add_argument("--limit_train", type=int, default=None, help="number of training samples to use, by default all")
    options.add_argument("--limit_test", type=int, default=None, help="number of test samples to use, by default all")
    arguments = options.parse_args()

    limits = {"limit_train": arguments.limit_train, "limit_test": arguments.limit_test}
    data = kd.ImageDataset("digits", image_size=IMAGE_SIZE, **limits)
    views = kd.ViewDataset(data, transform=kd.transforms.Crop(IMAGE_SIZE), num_views=VIEWS)
    teacher = kd.Teacher.from_run(arguments.teacher)
    cache = kd.TeacherCache.build(arguments.out / "cache", teacher, views, batch_size=64)

    torch.manual_seed(0)
    student = torchvision.models.resnet18(num_classes=len(data.class_names))
    trainer = DistillationTrainer(
        cache,
        kd.LossWeights(temperature=4.0, alpha=0.9),
        model=kd.Distiller(student, mean=data.mean, std=data.std, logits=kd.losses.KL()),
        args=TrainingArguments(
            output_dir=str(arguments.out),
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=64,
            learning_rate=2e-3,
            # By default, the Trainer drops the columns of a sample that are not arguments of the model's forward.
            remove_unused_columns=False,
            label_names=["label"],
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=views,
        eval_dataset=data.split("test"),
        compute_metrics=accuracy,
        callbacks=[NextView(views)],
    )
    trainer.train()
    print(trainer.evaluate())
    if trainer.is_world_process_zero():
        weights = {name: tensor.cpu().contiguous() for name, tensor in student.state_dict().items()}
        save_file(weights, arguments.out / "model.safetensors")


if __name__ == "__main__":
    main()
