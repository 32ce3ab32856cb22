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


def test_runs_with_an_equal_seed_are_no_further_samples(tmp_path):
    seeds = {"b": {"seed": 1}, "c": {"seed": 0}, "d": {"seed": 1}, "e": {"seed": 2}}
    assert [group.positions for group in grouped(loaded(tmp_path, *"abcde", **seeds))] == [[0, 1, 4], [2, 3]]


@pytest.mark.parametrize("change", [{"data": {"label_names": ["a", "b"], "digest": 2}}, {"teacher_fingerprint": "other"}])
def test_other_data_or_another_teacher_under_equal_settings_divide_a_group(tmp_path, change):
    first, second = finished_run(tmp_path, "a"), finished_run(tmp_path, "b", **change)
    write_settings(first)
    write_settings(second, seed=1)
    assert [group.positions for group in grouped([load_run(run, None) for run in (first, second)])] == [[0], [1]]


@pytest.mark.parametrize("change", [{"train": {"epochs": 4}}, {"teacher": {"run": "t"}}, {"data": {"source": "other"}}])
def test_any_other_setting_divides_a_group(tmp_path, change):
    assert [group.positions for group in grouped(loaded(tmp_path, "a", "b", b=change))] == [[0], [1]]


def test_a_run_without_config_is_alone_and_an_unfinished_one_is_in_no_group(tmp_path):
    results = [load_run(finished_run(tmp_path, name), None) for name in "ab"]
    results.append(load_run(unfinished_run(tmp_path, "c"), None))
    assert [group.positions for group in grouped(results)] == [[0], [1]]


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (("s-seed0", "s-seed1"), "s"),
        (("net_s1", "net_s2"), "net"),
        (("0", "1"), "0"),
        (("abc4", "abc7"), "abc"),
        (("net-seed10", "net-seed11"), "net"),
        (("net-seed1", "net-seed10"), "net"),
        (("students0", "students1"), "students"),
        (("resnet18-a", "resnet18-b"), "resnet18"),
    ],
)
def test_the_name_of_a_group_is_the_common_part(tmp_path, names, common):
    (group,) = grouped(loaded(tmp_path, *names, **{names[1]: {"seed": 1}}))
    assert group.name == common


def test_groups_with_the_same_name_have_different_names(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
    results = loaded(tmp_path / "one", "s-seed0", "s-seed1", "t", **{"s-seed1": {"seed": 1}})
    change = {"train": {"epochs": 9}}
    results += loaded(
        tmp_path / "two", "s-seed0", "s-seed1", "t", **{"s-seed0": change, "s-seed1": {"seed": 1, **change}}, t=change
    )
    where = [tmp_path / "one/s-seed0", tmp_path / "one/t", tmp_path / "two/s-seed0", tmp_path / "two/t"]
    names = ["s", "t", "s", "t"]
    assert [group.name for group in grouped(results)] == [f"{name} ({path})" for name, path in zip(names, where, strict=True)]


def test_mean_and_deviation(tmp_path):
    runs = [finished_run(tmp_path, name, accuracy=accuracy) for name, accuracy in (("a", 0.5), ("b", 0.7))]
    for seed, directory in enumerate(runs):
        write_settings(directory, seed=seed)
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
