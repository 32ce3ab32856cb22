"""Several seeds of one config: the numbers of `--seeds`, and names and directories of the runs."""

import pytest

from kd_accel.config.schema import RunConfig
from kd_accel.config.seeds import parse_seeds, with_seed


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", [0, 1, 2]), ("1", [0]), ("0,5,7", [0, 5, 7]), ("5,", [5]), (" 4 , 2 ", [4, 2])]
)
def test_numbers_and_lists(text, seeds):
    mistakes = []
    assert parse_seeds(text, mistakes) == seeds and mistakes == []


@pytest.mark.parametrize("text", ["0", "x", "-1", "1,1", "1.5", "", ",", "2000", f"{2**32},", "1,,2"])
def test_mistakes(text):
    mistakes = []
    parse_seeds(text, mistakes)
    assert len(mistakes) == 1 and mistakes[0].startswith("--seeds: ")


def test_each_seed_has_a_run_of_its_own():
    runs = [with_seed(RunConfig(name="kd"), 2), with_seed(RunConfig(name="kd", run_dir="runs/other"), 3)]
    assert [(run.name, str(run.directory), run.seed) for run in runs] == [
        ("kd-seed2", "runs/kd-seed2", 2),
        ("kd-seed3", "runs/other-seed3", 3),
    ]
