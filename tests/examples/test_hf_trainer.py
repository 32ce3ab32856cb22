"""The example with the Trainer of transformers: its loss, the views of each epoch, and the program itself."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import resnet18

import kd_accel as kd
from tests.support.launching import ROOT, python
from tests.support.models import student as student_network
from tests.support.models import teacher as teacher_network

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kd-accel[examples]'")
pytestmark = pytest.mark.slow

PROGRAM = ROOT / "examples/hf_trainer.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("hf_trainer", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_trainer_minimizes_the_distillation_loss_of_the_current_view(tmp_path, example):
    torch.manual_seed(0)
    data = kd.ImageDataset("digits", limit_train=32, limit_test=16)
    views = kd.ViewDataset(data, kd.transforms.Crop(32), num_views=2)
    teacher = kd.Teacher(teacher_network(10), mean=data.mean, std=data.std)
    cache = kd.TeacherCache.build(tmp_path / "cache", teacher, views, dtype="float32", batch_size=16)
    weights = kd.LossWeights(temperature=3.0, alpha=0.6)
    visited = []  # (split, view, index) of every sample

    class Recording(example.DistillationTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            view, split = (inputs["view"], "train") if model.training else (0, "test")
            logits = model.student(model.normalize(inputs["image"]))
            distance = kd.losses.kl_loss(logits, teacher(inputs["image"]).logits, temperature=3.0)
            expected = 0.6 * distance + 0.4 * kd.losses.cross_entropy(logits, inputs["label"])
            result = super().compute_loss(model, inputs, return_outputs, **options)
            assert torch.allclose(result[0] if return_outputs else result, expected, atol=1e-5)
            visited.extend((split, int(torch.as_tensor(view).unique()), index) for index in inputs["index"].tolist())
            return result

    trainer = Recording(
        cache,
        weights,
        model=kd.Distiller(student_network(10), mean=data.mean, std=data.std, logits=kd.losses.KL()),
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=3,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            remove_unused_columns=False,
            label_names=["label"],
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=views,
        eval_dataset=data.split("test"),
        compute_metrics=example.accuracy,
        callbacks=[example.NextView(views)],
    )
    trainer.train()
    indices = sorted(item["index"] for item in data)
    for epoch in range(3):
        share = visited[32 * epoch :][:32]
        assert {(split, view) for split, view, _ in share} == {("train", epoch % 2)}
        assert sorted(index for _, _, index in share) == indices
    measured = trainer.evaluate()
    with torch.no_grad():
        test = data.split("test")
        images = torch.stack([item["image"] for item in test])
        predicted = trainer.model.student(trainer.model.normalize(images)).argmax(1)
    assert measured["eval_accuracy"] == (predicted == torch.tensor([item["label"] for item in test])).float().mean()
    assert [split for split, _, _ in visited[96:]] == ["test"] * 16


def test_program_trains_a_student(tmp_path):
    settings = {"data": {"source": "digits", "limit_train": 64, "limit_test": 16}, "tracking": {"wandb": "disabled"}}
    kd.train(settings, run_dir=tmp_path / "teacher", **{"train.max_steps": 1, "train.batch_size": 32})
    flags = ["--teacher", tmp_path / "teacher", "--out", tmp_path / "out", "--epochs", "1"]
    done = python(PROGRAM, *flags, "--limit_train", "64", "--limit_test", "16")
    assert "'eval_accuracy': " in done.stdout
    resnet18(num_classes=10).load_state_dict(load_file(tmp_path / "out/model.safetensors"))
