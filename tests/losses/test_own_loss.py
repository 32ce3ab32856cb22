"""User-defined losses by import name, with a trained parameter and a memory bank, in real processes and over a resume."""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kd_accel.models.factory import build_model
from tests.support.in_process import train as train_in_process
from tests.support.launching import ROOT, metrics, train

SAMPLES = 160
BANK, SCALE = "feature_losses.own.bank", "feature_losses.own.scale"
HEAD = "feature_losses.own.head.conv.weight"
STOP_AT = 11
"""A step in the middle of an epoch of 8 steps."""


def flags(teacher_run):
    return [
        f"--teacher.run={teacher_run}",
        "--distill.logits.loss=import:tests.support.losses:PowerLoss",
        "--distill.logits.args.power=1.5",
        "--distill.features.own.loss=import:tests.support.losses:BankLoss",
        "--distill.features.own.args={samples: 160, momentum: 0.3}",
        "--distill.features.own.layers={layer2: layer2}",
        "--distill.features.own.weight=0.5",
    ]


def state(run_dir):
    """Load the trained module of the last checkpoint."""
    last = max((Path(run_dir) / "checkpoints").glob("step-*"))
    return load_file(last / "module.safetensors")


def files(run_dir):
    """Read the files of the deployed student and of the trained module in the last checkpoint."""
    last = max((Path(run_dir) / "checkpoints").glob("step-*"))
    return [path.read_bytes() for path in (Path(run_dir) / "model.safetensors", last / "module.safetensors")]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_loss_with_memory_bank_is_deterministic_and_resumes_exactly(tmp_path, teacher_run, processes):
    one, again, paused = tmp_path / "one", tmp_path / "again", tmp_path / "paused"
    train(one, *flags(teacher_run), processes=processes)
    train(again, *flags(teacher_run), processes=processes)
    assert files(one) == files(again)

    train(paused, *flags(teacher_run), f"--checkpoint.stop_after_steps={STOP_AT}", processes=processes)
    before = state(paused)
    assert not (paused / "model.safetensors").exists()
    train(paused, *flags(teacher_run), processes=processes)
    assert files(paused) == files(one)
    assert metrics(paused) == metrics(one)

    after = state(one)
    assert all(not before[name].equal(after[name]) for name in (BANK, SCALE, HEAD))
    used = after[BANK].norm(dim=1)
    assert after[BANK].shape == (SAMPLES, 32)
    assert (used > 0).sum() == 128, "the bank must have the training samples of all processes, and no validation samples"
    assert used[used > 0].sub(1).abs().max() < 1e-5

    student = build_model("import:tests.support.models:student", num_classes=4).state_dict()
    assert load_file(one / "model.safetensors").keys() == student.keys()


def test_terms_of_user_losses_are_logged(tmp_path, teacher_run):
    run_dir = tmp_path / "run"
    train(run_dir, *flags(teacher_run), "--train.epochs=1")
    lines = metrics(run_dir, "train")
    assert {"ce", "logits", "features/own", "features/own/weight", "alpha", "temperature"} <= lines[0].keys()
    assert lines[-1]["features/own"] < lines[0]["features/own"]
    for line in lines:
        total = 0.5 * line["logits"] + 0.5 * line["ce"] + 0.5 * line["features/own"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    assert json.loads((run_dir / "summary.json").read_text())["role"] == "distilled"


def test_settings_of_user_losses_are_checked(tmp_path, teacher_run):
    wrong = ["--distill.features.own.args={sample: 160}", "--distill.logits.args.power=high"]
    message = train(tmp_path / "run", *flags(teacher_run), *wrong[1:], code=2).stderr
    assert "distill.logits.args.power: 'high' is not valid: input should be a valid number" in message
    message = train(tmp_path / "run", *flags(teacher_run), *wrong[:1], code=2).stderr
    assert "distill.features.own.args.sample: no such setting; did you mean distill.features.own.args.samples?" in message
    assert not (tmp_path / "run").exists()


def test_example_loss_of_the_documentation_trains(tmp_path, teacher_run, monkeypatch):
    page = (ROOT / "docs/tutorials/own_loss.md").read_text()
    (code,) = re.findall(r'```python title="my_losses.py"\n(.*?)```', page, re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["--distill.features.cosine.loss=import:my_losses:Cosine", "--distill.features.cosine.layers=[layer2]"]
    train_in_process(tmp_path / "run", f"--teacher.run={teacher_run}", *own, "--distill.features.cosine.args.margin=0.1")
    distances = [line["features/cosine"] for line in metrics(tmp_path / "run", "train")]
    assert distances[-1] < distances[0]
    assert "feature_losses.cosine.head.conv.weight" in state(tmp_path / "run")
