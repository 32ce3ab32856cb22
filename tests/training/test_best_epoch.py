"""Weights of the best epoch next to the last, and the end of a training whose validation accuracy no longer rises."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from kd_accel.training.state import Position
from tests.support import launching
from tests.support.in_process import train
from tests.support.launching import metrics, summary
from tests.support.resuming import EVERYTHING, assert_same_run

WAVERING = [
    "--model.arch=import:tests.support.models:student_with_everything",
    "--optim.schedule=constant",
    "--optim.lr=1e-6",
    "--train.epochs=8",
]
"""Flags of a training whose accuracy changes by chance: only BatchNorm's statistics change much."""

BEST, PATIENCE = ["--checkpoint.keep_best=true"], ["--train.early_stopping_epochs=3"]


def accuracies(run_dir):
    return [line["accuracy"] for line in metrics(run_dir, "val")]


def best_epoch(run_dir):
    """Return the first epoch with the best validation accuracy."""
    found = accuracies(run_dir)
    return 1 + found.index(max(found))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A training of all eight epochs. Its best epoch is neither the first nor one of the last three."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(run_dir, *WAVERING)
    assert len(accuracies(run_dir)) == 8 and 1 < best_epoch(run_dir) < 6
    return run_dir


@pytest.mark.parametrize("average", [[], ["--train.ema_decay=0.9"]], ids=["last", "average"])
def test_the_best_weights_are_those_of_a_training_that_ends_there(tmp_path, average):
    run_dir, flags = tmp_path / "run", [*WAVERING, *average]
    text = train(run_dir, *flags, *BEST)
    epoch = best_epoch(run_dir)
    assert summary(run_dir)["best_epoch"] == epoch < 8
    train(tmp_path / "ended", *flags, f"--train.epochs={epoch}")
    assert (run_dir / "model_best.safetensors").read_bytes() == (tmp_path / "ended/model.safetensors").read_bytes()
    assert summary(run_dir)["accuracy_best"] == summary(tmp_path / "ended")["accuracy"]
    shown = f"{100 * summary(tmp_path / 'ended')['accuracy']:.2f} % with the weights of the best epoch, {epoch}"
    assert shown in text
    last, best = (load_file(run_dir / name) for name in ("model.safetensors", "model_best.safetensors"))
    assert not torch.equal(last["fc.weight"], best["fc.weight"])


def test_the_last_weights_and_the_lines_are_those_of_a_training_without_it(tmp_path, plain):
    train(tmp_path / "run", *WAVERING, *BEST)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    assert metrics(tmp_path / "run") == metrics(plain)
    more = {"best_epoch", "accuracy_best", "agreement_best"}
    assert {**summary(tmp_path / "run"), "name": ""} == {
        **summary(plain),
        "name": "",
        **{name: summary(tmp_path / "run")[name] for name in more},
    }
    assert not (plain / "model_best.safetensors").exists()
    assert not list((plain / "checkpoints").glob("*/best.safetensors"))


def test_the_training_ends_after_too_many_epochs_without_a_better_accuracy(tmp_path, plain):
    text = train(tmp_path / "run", *WAVERING, *PATIENCE)
    end = best_epoch(plain) + 3
    assert accuracies(tmp_path / "run") == accuracies(plain)[:end] and end < 8
    found = summary(tmp_path / "run")
    assert (found["stopped_early_after_epoch"], found["best_epoch"], found["steps"]) == (end, end - 3, 8 * end)
    assert f"stopped early after epoch {end} of 8: the best validation result is that of epoch {end - 3}" in text
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "finished already" in train(tmp_path / "run", *WAVERING, *PATIENCE)
    assert {path: path.read_bytes() for path in before} == before


def test_a_training_that_still_improves_is_not_ended(tmp_path):
    flags = [*WAVERING, "--optim.lr=0.002", "--train.early_stopping_epochs=1", "--train.epochs=4"]
    train(tmp_path / "run", *flags, *BEST)
    found, values = summary(tmp_path / "run"), accuracies(tmp_path / "run")
    assert values == sorted(set(values)) and len(values) == 4, "each epoch is better than the last"
    assert found["stopped_early_after_epoch"] is None and found["best_epoch"] == 4
    assert found["accuracy_best"] == found["accuracy"]
    assert (tmp_path / "run/model_best.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


def test_epochs_without_an_evaluation_count_for_the_patience(tmp_path, plain):
    """A training with a patience of three epochs can end after the fourth if every second epoch is evaluated."""
    train(tmp_path / "run", *WAVERING, *PATIENCE, "--train.eval_every_epochs=2")
    of_even = accuracies(plain)[1::2]
    best, ended = 0, None
    for epoch, value in zip((2, 4, 6), of_even, strict=False):
        best = epoch if best == 0 or value > of_even[best // 2 - 1] else best
        ended = ended or (epoch if epoch - best >= 3 else None)
    assert summary(tmp_path / "run")["stopped_early_after_epoch"] == ended
    assert summary(tmp_path / "run")["best_epoch"] == best


@pytest.mark.parametrize("stop", [11, 30, 56])
def test_a_resumed_training_ends_at_the_same_epoch_with_the_same_files(tmp_path, stop):
    """The stops are before and after the best epoch, and at the last step."""
    flags = [*WAVERING, *BEST, *PATIENCE, "--train.ema_decay=0.5", "--checkpoint.every_epochs=null"]
    train(tmp_path / "straight", *flags)
    steps = summary(tmp_path / "straight")["steps"]
    assert summary(tmp_path / "straight")["stopped_early_after_epoch"] is not None
    train(tmp_path / "stopped", *flags, f"--checkpoint.stop_after_steps={min(stop, steps - 1)}")
    assert not (tmp_path / "stopped/summary.json").exists()
    train(tmp_path / "stopped", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    best = [(tmp_path / name / "model_best.safetensors").read_bytes() for name in ("straight", "stopped")]
    assert best[0] == best[1]


def test_a_lost_file_is_written_again_from_the_checkpoint(tmp_path):
    flags = [*WAVERING, *BEST]
    train(tmp_path / "straight", *flags)
    train(tmp_path / "run", *flags, "--checkpoint.stop_after_steps=60")
    (tmp_path / "run/model_best.safetensors").write_bytes(b"of a later epoch, before a kill")
    train(tmp_path / "run", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "run")
    best = [(tmp_path / name / "model_best.safetensors").read_bytes() for name in ("straight", "run")]
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("kill_in_epoch", [2, 5])
def test_a_killed_training_ends_with_the_same_files(tmp_path, kill_in_epoch):
    flags = [*WAVERING, *BEST, *PATIENCE]
    train(tmp_path / "straight", *flags)
    process = launching.start("train", f"--run_dir={tmp_path / 'killed'}", *launching.SMALL, *flags)
    for line in process.stdout:
        if f"epoch {kill_in_epoch} done" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate(timeout=60)
    train(tmp_path / "killed", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "killed")
    best = [(tmp_path / name / "model_best.safetensors").read_bytes() for name in ("straight", "killed")]
    assert best[0] == best[1]


@pytest.mark.slow
def test_two_processes_end_at_the_same_epoch_and_resume(tmp_path):
    flags = [*EVERYTHING, "--train.max_steps=null", *WAVERING, *BEST, "--train.early_stopping_epochs=1"]
    launching.train(tmp_path / "straight", *flags, processes=2)
    found = summary(tmp_path / "straight")
    assert found["stopped_early_after_epoch"] == found["best_epoch"] + 1
    launching.train(tmp_path / "stopped", *flags, f"--checkpoint.stop_after_steps={found['steps'] - 5}", processes=2)
    launching.train(tmp_path / "stopped", *flags, processes=2)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    best = [(tmp_path / name / "model_best.safetensors").read_bytes() for name in ("straight", "stopped")]
    assert best[0] == best[1]


def test_the_best_weights_can_teach_and_be_fine_tuned(tmp_path, plain):
    run_dir = tmp_path / "run"
    train(run_dir, *WAVERING, *BEST)
    weights = run_dir / "model_best.safetensors"
    arch = "import:tests.support.models:student_with_everything"
    distilled = [f"--teacher.arch={arch}", f"--teacher.weights={weights}", "--teacher.min_accuracy=null"]
    train(tmp_path / "student", *distilled, "--train.max_steps=1")
    assert summary(tmp_path / "student")["teacher_accuracy"] == summary(run_dir)["accuracy_best"]
    assert summary(run_dir)["accuracy_best"] != summary(run_dir)["accuracy"]
    tuned = [f"--model.arch={arch}", f"--model.weights={weights}", "--model.freeze=[layer1, layer2, dropout]"]
    text = train(tmp_path / "tuned", *tuned, "--optim.lr=1e-9", "--train.max_steps=1")
    assert "model.weights: images are normalized with mean" in text
    assert summary(tmp_path / "tuned")["accuracy"] == summary(run_dir)["accuracy_best"]


def test_agreement_counts_without_labels():
    position = Position()
    values = enumerate([0.5, 0.75, 0.75, 0.25], 1)
    found = [position.note_validation({"agreement": value}, epochs_done=epoch) for epoch, value in values]
    assert found == [True, True, False, False]
    assert (position.best_epoch, position.best_val_agreement, position.best_val_accuracy) == (2, 0.75, None)
    both = Position()
    assert both.note_validation({"accuracy": 0.0, "agreement": 1.0}, epochs_done=1)
    assert not both.note_validation({"accuracy": 0.0, "agreement": 0.0}, epochs_done=2)
    assert both.best_val_accuracy == 0.0 and both.best_val_agreement is None


def test_a_checkpoint_of_an_earlier_version_is_resumed(tmp_path):
    """It lacks the new fields of the position, and its config the new settings."""
    train(tmp_path / "straight", *WAVERING)
    train(tmp_path / "run", *WAVERING, "--checkpoint.stop_after_steps=20")
    (state_file,) = (tmp_path / "run/checkpoints").glob("*20/state.json")
    content = json.loads(state_file.read_text())
    for name in ("best_val_agreement", "best_epoch", "stopped_early"):
        del content["state"]["position"][name]
    for section, name in (
        ("data", "sampling"),
        ("model", "freeze"),
        ("optim", "norm_bias_weight_decay"),
        ("train", "class_weights"),
        ("train", "early_stopping_epochs"),
        ("checkpoint", "keep_best"),
    ):
        del content["state"]["config"][section][name]
    state_file.write_text(json.dumps(content))
    text = train(tmp_path / "run", *WAVERING)
    assert "resumes with changed settings: checkpoint.stop_after_steps" in text and "keep_best" not in text
    assert_same_run(tmp_path / "straight", tmp_path / "run")


@pytest.mark.parametrize("wrong", [{"best_epoch": -1}, {"stopped_early": 1}, {"best_val_agreement": "x"}, {"more": 1}])
def test_a_damaged_position_is_refused(tmp_path, wrong):
    train(tmp_path / "run", "--checkpoint.stop_after_steps=3")
    (state_file,) = (tmp_path / "run/checkpoints").glob("*/state.json")
    content = json.loads(state_file.read_text())
    content["state"]["position"] |= wrong
    state_file.write_text(json.dumps(content))
    assert "is damaged (position wrong or missing)" in train(tmp_path / "run", code=2)


def test_validation_samples_are_needed(tmp_path):
    flags = ["--data.val_fraction=0.001", *BEST, *PATIENCE, "--train.epochs=8"]
    message = train(tmp_path / "run", *flags, code=2)
    assert "checkpoint.keep_best and train.early_stopping_epochs: has no effect, because no sample is held" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--train.early_stopping_epochs=3"],
            "train.early_stopping_epochs: 3 has no effect, because the training ends in epoch 4 (train.max_steps: ",
        ),
        (["--optim.schedule=step", "--optim.step_epochs=[4, 20]"], "optim.step_epochs: [4, 20] has no effect, because the"),
    ],
)
def test_settings_of_epochs_beyond_the_last_step_are_noticed(tmp_path, flags, message):
    """An epoch has 8 steps."""
    shared = ["--train.epochs=30", *flags, "--checkpoint.stop_after_steps=1"]
    assert message in train(tmp_path / "run", *shared, "--train.max_steps=26")
    assert "has no effect" not in train(tmp_path / "longer", *shared, "--train.max_steps=33")
