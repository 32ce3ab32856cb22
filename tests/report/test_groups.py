"""Groups of seeds, and labels of runs."""

import pytest

from kd_accel.report.groups import grouped, run_labels
from kd_accel.report.run_files import load_run
from tests.report.runs import finished_run, unfinished_run, write_settings


def loaded(root, *names, **changes):
    """Load finished runs; changes: Settings of each run by name of the directory."""
    results = []
    for name in names:
        directory = finished_run(root, name)
        write_settings(directory, **changes.get(name, {}))
        results.append(load_run(directory, None))
    return results


def test_seed_name_directory_and_tracking_do_not_divide_a_group(tmp_path):
    changes = {"b": {"seed": 1, "run_dir": "/x", "tracking": {"wandb": "online", "tags": ["t"]}}}
    assert [group.positions for group in grouped(loaded(tmp_path, "a", "b", **changes))] == [[0, 1]]


@pytest.mark.parametrize("change", [{"train": {"epochs": 4}}, {"teacher": {"run": "t"}}, {"data": {"source": "other"}}])
def test_any_other_setting_divides_a_group(tmp_path, change):
    assert [group.positions for group in grouped(loaded(tmp_path, "a", "b", b=change))] == [[0], [1]]


def test_a_run_without_config_is_alone_and_an_unfinished_one_is_in_no_group(tmp_path):
    results = [load_run(finished_run(tmp_path, name), None) for name in "ab"]
    results.append(load_run(unfinished_run(tmp_path, "c"), None))
    assert [group.positions for group in grouped(results)] == [[0], [1]]


@pytest.mark.parametrize(
    ("names", "common"),
    [(("s-seed0", "s-seed1"), "s"), (("net_s1", "net_s2"), "net"), (("0", "1"), "0"), (("abc4", "abc7"), "abc")],
)
def test_the_name_of_a_group_is_the_common_part(tmp_path, names, common):
    (group,) = grouped(loaded(tmp_path, *names))
    assert group.name == common


def test_mean_and_deviation(tmp_path):
    runs = [finished_run(tmp_path, name, accuracy=accuracy) for name, accuracy in (("a", 0.5), ("b", 0.7))]
    for directory in runs:
        write_settings(directory)
    (group,) = grouped([load_run(directory, None) for directory in runs])
    assert group.mean("accuracy") == pytest.approx(0.6) and group.deviation("accuracy") == pytest.approx(0.02**0.5)
    assert group.mean("latency_ms") is None and group.deviation("latency_ms") is None


def test_runs_with_the_same_name_have_different_labels(tmp_path):
    (tmp_path / "more").mkdir()
    results = loaded(tmp_path, "a", "b", b={"seed": 1})
    results += loaded(tmp_path / "more", "a", a={"seed": 2})
    for result in results[:2]:
        object.__setattr__(result.row, "name", "a")
    assert run_labels(results) == ["a, seed 0", "a, seed 1", "a, seed 2"]
    object.__setattr__(results[2].row, "seed", 1)
    assert run_labels(results) == ["a, seed 0", f"a ({tmp_path / 'b'})", f"a ({tmp_path / 'more/a'})"]
