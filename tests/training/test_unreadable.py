"""Images that cannot be read during a training: the stop after a checkpoint, and what is done with the same command later."""

import json

import numpy as np
import pytest

from kd_accel.config.schema import DataConfig
from kd_accel.data.datamodule import load_data
from kd_accel.data.loader import epoch_order
from kd_accel.errors import UnreadableImage
from kd_accel.models.weights import load_run_model
from kd_accel.training.unreadable import ReadAhead
from tests.support import image_files, launching
from tests.support.holding import Hold
from tests.support.in_process import train
from tests.support.launching import SMALL, metrics, start, summary

STEPS_PER_EPOCH = 5
MEAN = [0.5, 0.5, 0.5]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of which 80 are for training and 20 for validation; both splits are decoded on demand."""
    return image_files.write_noise(tmp_path_factory.mktemp("images"), train=50, test=45)


@pytest.fixture
def folder(images, tmp_path):
    """A copy of the images, as hard links."""
    for file in images.rglob("*.png"):
        link = tmp_path / "images" / file.relative_to(images)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(file)
    return tmp_path / "images"


def flags(folder):
    return [
        f"--data.source=imagefolder:{folder}",
        "--data.image_size=64",
        "--data.memory_limit_mib=1",
        f"--data.mean={MEAN}",
        f"--data.std={MEAN}",
    ]


def files_of(folder, split, step=None):
    """Return the files of a split in the order of the samples; of the training split those of one step of the first epoch."""
    statistics = {"mean": MEAN, "std": MEAN}
    config = DataConfig(source=f"imagefolder:{folder}", image_size=64, memory_limit_mib=1, val_fraction=0.2, **statistics)
    data = load_data(config)
    samples = data.splits.by_name()[split]
    if step is not None:
        samples = epoch_order(samples, seed=0, epoch=0)[16 * step : 16 * (step + 1)]
    images = data.test if split == "test" else data.train
    return [image_files.Path(images._column._paths[sample]) for sample in samples]


class Broken:
    """An image file that cannot be decoded until it is restored."""

    def __init__(self, file):
        self.file, self._content = file, file.read_bytes()
        self._replace(b"broken")

    def restore(self):
        self._replace(self._content)

    def _replace(self, content):
        # Not written in place: the file may be a hard link.
        self.file.unlink()
        self.file.write_bytes(content)


def assert_same_training(one, other):
    """Check that two runs on copies of the same images are equal, bit for bit."""
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert metrics(one) == metrics(other)


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    train(run_dir, *flags(images))
    return run_dir


@pytest.mark.parametrize(("step", "steps_done"), [(0, 0), (1, 0), (2, 1), (4, 3)])
def test_a_training_stops_after_a_checkpoint_and_resumes_with_another_image(folder, tmp_path, step, steps_done):
    """The image was never readable, so that nobody can restore it: any other image takes its place."""
    broken = Broken(files_of(folder, "train", step)[3])
    output = train(tmp_path / "run", *flags(folder), code=2)
    reason = "not an image file of a supported format"
    assert f"{broken.file}, cannot be decoded ({reason}); stopped after step {steps_done}, " in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{steps_done:08}"]
    # Without a change the same image stops it again, at the same step.
    assert f"stopped after step {steps_done}, " in train(tmp_path / "run", *flags(folder), code=2)
    image_files.noise(np.random.default_rng(1)).save(broken.file)
    train(tmp_path / "run", *flags(folder))
    assert [line["step"] for line in metrics(tmp_path / "run", "train")] == list(range(1, 16))
    assert "finished already" in train(tmp_path / "run", *flags(folder))


def test_another_image_may_not_change(folder, tmp_path):
    train(tmp_path / "run", *flags(folder), "--checkpoint.stop_after_steps=2")
    image_files.noise(np.random.default_rng(1)).save(Broken(files_of(folder, "train", 4)[0]).file)
    assert "was trained on other data (digest: " in train(tmp_path / "run", *flags(folder), code=2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_goes_bad_stops_all_ranks_and_a_restored_one_continues_exactly(folder, uninterrupted, tmp_path, processes):
    """The file breaks while the training runs, after the step whose batches are read already."""
    hold = Hold(tmp_path / "hold", 1)
    arguments = ["train", f"--run_dir={tmp_path}/run", *SMALL, *flags(folder)]
    process = start(*arguments, processes=processes, patch="holds", **hold.environment)
    hold.wait_for_ranks(process, ranks=processes)
    broken = Broken(files_of(folder, "train", 4)[-1])
    hold.release()
    stdout, stderr = process.communicate(timeout=200)
    # A launcher has an exit code of its own.
    assert process.returncode == (2 if processes == 1 else 1), stderr
    assert stdout.count("stopped after step") + stderr.count("kd-accel: data.source: sample") == 1, stderr
    assert f"{broken.file}, cannot be decoded" in stderr and "Traceback" not in stderr.split("kd-accel:")[0]
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(checkpoint.name[-8:]) < STEPS_PER_EPOCH
    broken.restore()
    train(tmp_path / "run", *flags(folder))
    if processes == 1:
        assert_same_training(tmp_path / "run", uninterrupted)
    assert [line["step"] for line in metrics(tmp_path / "run", "train")] == list(range(1, 16))


@pytest.mark.parametrize(("epochs", "steps"), [(3, 5), (1, 5)])
def test_a_bad_validation_image_stops_at_the_end_of_the_epoch_which_is_evaluated_later(images, folder, tmp_path, epochs, steps):
    broken = Broken(files_of(folder, "val")[7])
    arguments = [*flags(folder), f"--train.epochs={epochs}"]
    assert f"stopped after step {steps}, with a checkpoint" in train(tmp_path / "run", *arguments, code=2)
    broken.restore()
    train(tmp_path / "run", *arguments)
    train(tmp_path / "whole", *flags(images), f"--train.epochs={epochs}")
    assert len(metrics(tmp_path / "run", "val")) == epochs
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert summary(tmp_path / "run")["accuracy_best_val"] == summary(tmp_path / "whole")["accuracy_best_val"]


def test_a_bad_test_image_does_not_lose_the_training(folder, uninterrupted, tmp_path):
    broken = Broken(files_of(folder, "test")[7])
    output = train(tmp_path / "run", *flags(folder), code=2)
    assert f"{broken.file}, cannot be decoded" in output and f"its model is in {tmp_path}/run. Restore or remove" in output
    assert not (tmp_path / "run" / "summary.json").exists()
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert model == (uninterrupted / "model.safetensors").read_bytes()
    load_run_model(tmp_path / "run")
    broken.restore()
    output = train(tmp_path / "run", *flags(folder))
    assert ": step " not in output and "test accuracy" in output
    assert_same_training(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("remedy", "samples"),
    [(["--data.on_error=skip"], 89), (["--data.limit_test=5"], 5), (["--data.test_split=other"], 20), ([], 89)],
    ids=["skip", "limit", "split", "removed"],
)
def test_the_test_split_may_change_as_long_as_the_run_is_not_finished(folder, tmp_path, remedy, samples):
    image_files.write_noise(folder, seed=9, other=10)
    file = Broken(files_of(folder, "test")[88]).file
    train(tmp_path / "run", *flags(folder), "--train.epochs=1", code=2)
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    if not remedy:
        file.unlink()
    train(tmp_path / "run", *flags(folder), "--train.epochs=1", *remedy)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == model
    content = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert content["data"]["test"]["samples"] == samples
    refused = train(tmp_path / "run", *flags(folder), "--train.epochs=1", "--data.limit_test=3", code=2)
    assert "data.limit_test: " in refused or "test: " in refused


@pytest.mark.slow
def test_a_bad_test_image_on_one_of_two_ranks_stops_both(folder, tmp_path):
    broken = Broken(files_of(folder, "test")[89])
    done = launching.train(tmp_path / "run", *flags(folder), "--train.epochs=1", processes=2, code=None)
    assert f"{broken.file}, cannot be decoded" in done.stderr and "lost its peers" not in done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_steps_are_read_ahead_and_a_failure_is_held_back():
    def steps():
        yield from ("a", "b")
        raise UnreadableImage("sample 3 cannot be decoded", "fix it", 3)

    reader = ReadAhead(steps(), ahead_steps=1)
    assert next(reader) == "a" and reader.failure is None
    assert next(reader) == "b" and reader.failure.sample == 3
    with pytest.raises(UnreadableImage, match="^data.source: sample 3 cannot be decoded; fix it$"):
        next(reader)
    assert list(ReadAhead(iter("abcd"), ahead_steps=2)) == list("abcd")
