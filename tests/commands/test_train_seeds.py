"""`kd-accel train --seeds`: one process trains several seeds, each as a process of its own would."""

import pytest

from tests.support.launching import metrics, train


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_the_second_seed_is_trained_as_if_it_were_alone(tmp_path, processes):
    flags = ["--model.arch=import:tests.support.models:student_with_everything", "--train.epochs=1"]
    train(tmp_path / "run", "--seeds=0,1", *flags, processes=processes)
    train(tmp_path / "alone", "--seed=1", *flags, processes=processes)
    first, second = tmp_path / "run-seed0", tmp_path / "run-seed1"
    models = [(directory / "model.safetensors").read_bytes() for directory in (first, second, tmp_path / "alone")]
    assert models[1] == models[2] != models[0]
    assert metrics(second) == metrics(tmp_path / "alone") and not (tmp_path / "run").exists()


def test_mistakes_in_the_seeds_are_reported(tmp_path):
    done = train(tmp_path / "run", "--seeds=two", code=2)
    assert done.stderr.startswith("kd-accel: --seeds: 'two' must be a number of seeds") and not list(tmp_path.iterdir())
