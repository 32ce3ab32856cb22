"""Checkpoints: an exact round trip, damage and other versions, links, failed writes, and writes in a thread."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from kd_accel.config.schema import OptimConfig
from kd_accel.errors import UserError
from kd_accel.io.files import remove_leftovers
from kd_accel.training.checkpoint import (
    VERSION,
    CheckpointWriter,
    HostCopies,
    find_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
)
from kd_accel.training.optim import build_optimizer
from tests.support.in_process import train
from tests.support.launching import metrics


def save(directory, step, keep=3, value=1.0):
    tensors = {"module": {"weight": torch.full((3, 2), value)}, "optimizer": {}}
    return save_checkpoint(directory, step=step, tensors=tensors, state={"step": step}, keep=keep)


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    save(tmp_path, 7, value=2.5)
    checkpoint = load_checkpoint(find_checkpoint(tmp_path))
    assert checkpoint.state == {"step": 7}
    assert torch.equal(checkpoint.tensors["module"]["weight"], torch.full((3, 2), 2.5))
    assert checkpoint.tensors["optimizer"] == {}


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 30):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000030"]


def test_a_second_checkpoint_of_a_step_replaces_the_first(tmp_path):
    for value in (1.0, 2.0):
        save(tmp_path, 4, keep=1, value=value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    weight = load_checkpoint(find_checkpoint(tmp_path)).tensors["module"]["weight"]
    assert torch.equal(weight, torch.full((3, 2), 2.0))


@pytest.mark.parametrize("next_step", [4, 5])
def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path, monkeypatch, next_step):
    """The process is killed at each of the two renames; then the training continues with the same or the next step."""
    rename = Path.rename
    for killed_at in (1, 2):
        directory, renamed = tmp_path / str(killed_at), []
        save(directory, 3)
        save(directory, 4)

        def killed(path, target, renamed=renamed, killed_at=killed_at):
            if path.name.startswith((".step-", "step-")):
                renamed.append(path)
                if len(renamed) == killed_at:
                    raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "rename", killed)
            save(directory, 4, value=2.0)
        found = find_checkpoint(directory)
        assert load_checkpoint(found).state == {"step": 4} and "00000004" in found.name
        assert torch.equal(load_checkpoint(found).tensors["module"]["weight"], torch.full((3, 2), 1.0))
        save(directory, next_step, value=3.0, keep=1)
        assert [path.name for path in directory.iterdir()] == [f"step-0000000{next_step}"]
        assert torch.equal(load_checkpoint(find_checkpoint(directory)).tensors["module"]["weight"], torch.full((3, 2), 3.0))


def test_a_damaged_checkpoint_does_not_replace_an_intact_one(tmp_path):
    save(tmp_path, 1)
    truncate(save(tmp_path, 9))
    save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_missing_directory_has_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path / "nowhere") is None


def truncate(path):
    data = (path / "module.safetensors").read_bytes()
    (path / "module.safetensors").write_bytes(data[:-1])


def flip_a_bit(path):
    data = bytearray((path / "module.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "module.safetensors").write_bytes(data)


def remove_a_file(path):
    (path / "optimizer.safetensors").unlink()


def cut_the_state(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:-9])


def remove_the_state(path):
    (path / "state.json").unlink()


def point_outside(path):
    content = json.loads((path / "state.json").read_text())
    content["files"]["../secret.safetensors"] = content["files"]["module.safetensors"]
    (path / "state.json").write_text(json.dumps(content))


def write_another_type(path):
    (path / "state.json").write_text("[1]")


def write_another_version(path, version):
    content = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**content, "version": version}))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "instead of"),
        (flip_a_bit, "does not match its checksum"),
        (remove_a_file, "optimizer.safetensors cannot be read"),
        (cut_the_state, "state.json is damaged"),
        (remove_the_state, "state.json cannot be read"),
        (point_outside, "outside the directory"),
        (write_another_type, "state.json is damaged"),
        (lambda path: write_another_version(path, "2"), "state.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(tmp_path, damage, reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with pytest.warns(UserWarning, match=f"step-00000002 is passed over: .*{reason}"):
        assert find_checkpoint(tmp_path).name == "step-00000001"


@pytest.mark.parametrize("version", [VERSION - 1, VERSION + 1])
def test_another_version_of_the_format_is_refused_and_left_alone(tmp_path, version):
    """It is not treated as damaged, because the next checkpoint would then replace it."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    write_another_version(path, version)
    with pytest.raises(UserError) as refused:
        find_checkpoint(tmp_path)
    for part in (str(path), f"version {version}", f"version {VERSION}", "from scratch in another run_dir"):
        assert part in str(refused.value)
    assert path.is_dir()


def test_a_run_with_checkpoints_of_another_version_is_refused_and_unchanged(tmp_path):
    flags = ["--checkpoint.stop_after_steps=3"]
    train(tmp_path / "run", *flags)
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    write_another_version(path, 1)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    text = train(tmp_path / "run", code=2)
    assert f"kd-accel: {path}: is of version 1 of the checkpoint format" in text and "another run_dir" in text
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    train(tmp_path / "other", *flags)
    assert (tmp_path / "other/checkpoints/step-00000003").is_dir()


def test_names_of_values_and_tensors_in_a_checkpoint(tmp_path, distilled):
    """The documentation and other programs rely on these keys."""
    train(tmp_path / "run", *distilled, "--checkpoint.stop_after_steps=2")
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/step-00000002")
    assert {
        "position",
        "config",
        "data",
        "teacher_fingerprint",
        "cache",
        "explained",
        "wandb_id",
        "ranks",
    } <= checkpoint.state.keys()
    assert checkpoint.state["explained"].keys() == {"layer1", "layer2"}
    assert checkpoint.state["meter_names"] == ["samples", "loss", "ce", "kl", "features/mse", "accuracy", "agreement"]
    assert checkpoint.tensors.keys() == {"module", "optimizer", "targets"}
    assert checkpoint.tensors["targets"].keys() == {
        f"{layer}|conv.{kind}" for layer in ("layer1", "layer2") for kind in ("weight", "bias")
    }
    module = checkpoint.tensors["module"]
    assert {"student.fc.weight", "feature_losses.mse.projectors.layer1.conv.weight"} <= module.keys()
    assert all(name.startswith(("student.", "feature_losses.mse.projectors.")) for name in module)


def test_a_temporary_directory_of_a_killed_process_is_not_a_checkpoint_and_is_removed(tmp_path):
    shutil.copytree(save(tmp_path, 1), tmp_path / ".step-00000002.tmp-123")
    assert find_checkpoint(tmp_path).name == "step-00000001"
    save(tmp_path, 3)
    assert not list(tmp_path.glob(".step*"))


def test_a_failed_write_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*resumes from the last intact checkpoint"):
        save(tmp_path / "file" / "checkpoints", 1)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimizer_resumes_exactly(name, tmp_path):
    def train_steps(model, optimizer, steps):
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.full((2, 3, 8, 8), 0.1 * (step + 1))).square().sum().backward()
            optimizer.step()

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        return model, build_optimizer(model.parameters(), OptimConfig(name=name, lr=0.01))

    straight, straight_optimizer = build()
    train_steps(straight, straight_optimizer, 3)
    tensors, numbers = optimizer_tensors(straight_optimizer)
    copies = HostCopies().copy({"m": straight.state_dict(), "o": tensors})
    path = save_checkpoint(tmp_path, step=3, tensors=copies, state={"numbers": numbers}, keep=1)
    train_steps(straight, straight_optimizer, 3)

    resumed, resumed_optimizer = build()
    checkpoint = load_checkpoint(path)
    restore_module(resumed, checkpoint.tensors["m"])
    restore_optimizer(resumed_optimizer, checkpoint.tensors["o"], checkpoint.state["numbers"])
    train_steps(resumed, resumed_optimizer, 3)
    for before, after in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(before, after)
    momentum = next(iter(resumed_optimizer.state.values()))
    assert all(value.is_contiguous(memory_format=torch.channels_last) for value in momentum.values() if value.dim() == 4)


def test_a_link_among_the_checkpoints_is_neither_read_nor_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    intact = save(elsewhere, 9)
    directory = tmp_path / "checkpoints"
    save(directory, 1)
    for name in ("step-00000002", "step-00000009", ".step-00000003.tmp-1"):
        (directory / name).symlink_to(intact)
    assert find_checkpoint(directory).name == "step-00000001"
    save(directory, 2, keep=1)
    assert (directory / "step-00000002").is_dir() and not (directory / "step-00000002").is_symlink()
    assert not (directory / "step-00000001").exists()
    assert find_checkpoint(elsewhere) == intact


def test_a_checkpoint_with_a_linked_file_is_damaged(tmp_path):
    save(tmp_path, 1)
    file = save(tmp_path, 2) / "module.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="step-00000002 is passed over: module.safetensors is not a regular file"):
        assert find_checkpoint(tmp_path).name == "step-00000001"


def test_temporary_files_behind_a_link_are_not_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for place in ("cache", "cache/train"):
        (tmp_path / place).mkdir()
        (tmp_path / place / ".x.tmp-1").write_text("")
    (tmp_path / "elsewhere/.x.tmp-1").write_text("")
    (tmp_path / "cache/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "cache/.folder.tmp-1").mkdir()
    remove_leftovers(tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").rglob("*")) == [".folder.tmp-1", "link", "train"]
    assert (tmp_path / "elsewhere/.x.tmp-1").exists()


def test_training_continues_during_a_write_which_saves_the_state_at_its_start(tmp_path, monkeypatch):
    reached = {}

    def slow(directory, *, step, **content):
        deadline = time.monotonic() + 60
        while step == 3 and metrics(tmp_path / "slow", "train")[-1]["step"] < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        reached[step] = metrics(tmp_path / "slow", "train")[-1]["step"]
        return save_checkpoint(directory, step=step, **content)

    flags = ["--checkpoint.every_steps=3", "--checkpoint.every_epochs=null", "--checkpoint.keep=20"]
    train(tmp_path / "plain", *flags)
    monkeypatch.setattr("kd_accel.training.checkpoint.save_checkpoint", slow)
    train(tmp_path / "slow", *flags)
    assert reached[3] >= 6
    assert list(reached) == list(range(3, 25, 3)), "writes are in order, one at a time"
    for step in reached:
        for file in ("module.safetensors", "optimizer.safetensors"):
            one, other = (tmp_path / run / "checkpoints" / f"step-{step:08d}" / file for run in ("plain", "slow"))
            assert one.read_bytes() == other.read_bytes()


def test_copies_are_contiguous_and_use_the_same_memory_again():
    copies, weight = HostCopies(), torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last)
    first = copies.copy({"module": {"weight": weight}})["module"]["weight"]
    assert first.is_contiguous() and torch.equal(first, weight)
    second = copies.copy({"module": {"weight": weight + 1}})["module"]["weight"]
    assert second.data_ptr() == first.data_ptr() and torch.equal(second, weight + 1)
    other = copies.copy({"module": {"weight": weight.half()}, "average": {"weight": weight}})
    assert torch.equal(other["module"]["weight"], weight.half()) and torch.equal(other["average"]["weight"], weight)


def test_the_error_of_a_failed_write_is_raised_by_the_next_call(tmp_path):
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter()
    writer.write(tmp_path / "file" / "checkpoints", step=1, tensors={}, state={}, keep=1)
    with pytest.raises(UserError, match="cannot write"):
        writer.write(tmp_path / "checkpoints", step=2, tensors={}, state={}, keep=1)
    writer.write(tmp_path / "checkpoints", step=3, tensors={}, state={}, keep=1)
    writer.wait()
    writer.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
