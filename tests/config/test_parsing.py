"""Parsing of files and flags into a config: merging, values as people and sweep tools write them, saved configs."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from kd_accel.config.fields import flatten
from kd_accel.config.parsing import build_config, load_config_file, save_config
from kd_accel.config.schema import DistillConfig, FeatureLossConfig, LogitLossConfig, RunConfig, Schedule
from kd_accel.errors import UserError
from kd_accel.io.user_code import VARIABLE
from tests.support.parsing import LOSSES, mistakes, parse

MSE = "distill: {features: {mse: {weight: 0.5, layers: [layer4], args: {direction: both}}}}\nteacher: {run: x}"


@pytest.fixture
def nothing_allowed(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


def test_later_files_override_earlier_files_and_flags_override_both(config_file):
    first = config_file({"seed": 1, "optim": {"lr": 0.1, "weight_decay": 0.5}, "train": {"epochs": 3}}, "a.yaml")
    second = config_file({"seed": 2, "optim": {"lr": 0.2}}, "b.yaml")
    for argv in (
        ["--config", first, "--config", second, "--optim.lr", "5e-1"],
        [f"--config={first}", "--optim.lr=5e-1", f"--config={second}"],
    ):
        config = parse(*argv)
        assert (config.seed, config.optim.lr, config.optim.weight_decay, config.train.epochs) == (2, 0.5, 0.5, 3)


def test_positional_files_are_merged_in_their_order_with_those_of_config(config_file):
    first, second, third = (config_file({"seed": seed, "name": f"run{seed}"}, f"{seed}.yaml") for seed in (1, 2, 3))
    assert parse(first, second).seed == 2 and parse(second, first).seed == 1
    for argv in ([first, "--config", second, third], ["--config", first, "--seed=5", second, f"--config={third}"]):
        assert parse(*argv, "--seed=3") == parse("--config", first, "--config", second, "--config", third)
    assert parse("--config", third, first).seed == 1
    assert parse("--optim.lr", "0.5", first).optim.lr == 0.5


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("nowhere.yaml", "config: file 'nowhere.yaml' not found; paths are relative to the working directory"),
        ("optim.lr=0.1", "config: file 'optim.lr=0.1' not found; a setting is given as --optim.lr=0.1"),
        ("seed", "config: file 'seed' not found; a setting is given as --seed VALUE"),
    ],
)
def test_positional_argument_that_is_not_a_file_is_refused(argument, expected):
    assert mistakes(argument) == expected


def test_later_file_is_merged_into_every_mapping(config_file):
    later = "distill: {features: {second: {loss: mse, weight: 1}, mse: {args: {pca_images: 64}}}}\nmodel: {arch_args: {b: 2}}\n"
    files = [config_file(f"{MSE}\nmodel: {{arch_args: {{a: 1}}}}", "a.yaml"), config_file(later, "b.yaml")]
    config = parse("--config", files[0], "--config", files[1], "--model.arch_args.c=three")
    assert config.model.arch_args == {"a": 1, "b": 2, "c": "three"}
    assert config.distill.features == {
        "mse": FeatureLossConfig(weight=0.5, layers=["layer4"], args={"direction": "both", "pca_images": 64}),
        "second": FeatureLossConfig(loss="mse", weight=1.0),
    }


def test_flags_change_or_create_an_entry_of_a_mapping(config_file):
    flags = ["--distill.features.mse.args.direction=teacher_to_student", "--distill.features.mse.weight=0.2"]
    created = parse("--teacher.run=x", *flags).distill
    assert created.features == {"mse": FeatureLossConfig(weight=0.2, args={"direction": "teacher_to_student"})}
    changed = parse("--config", config_file(MSE), *flags).distill
    assert changed.features["mse"].layers == ["layer4"]
    assert (changed.features["mse"].weight, changed.features["mse"].args) == (0.2, {"direction": "teacher_to_student"})


def test_layers_are_names_or_pairs():
    layers = "--distill.features.mse.layers"
    assert parse("--teacher.run=x", f"{layers}=[a, b]").distill.features["mse"].layers == ["a", "b"]
    assert parse("--teacher.run=x", f"{layers}={{a: c}}", f"{layers}.b=d").distill.features["mse"].layers == {
        "a": "c",
        "b": "d",
    }


@pytest.mark.parametrize("null", ["null", "None"])
def test_null_removes_an_entry(config_file, null):
    path = config_file(f"{MSE}\nmodel: {{arch_args: {{a: 1, b: 2}}}}")
    config = parse("--config", path, f"--distill.features.mse={null}", f"--model.arch_args.a={null}")
    assert config.distill.features == {} and config.model.arch_args == {"b": 2}
    later = config_file("distill: {features: {mse: null}}", "later.yaml")
    assert parse("--config", path, "--config", later).distill.features == {}
    assert parse(f"--distill.features.mse={null}").distill is None, "no entry to remove, and no section is created"


def test_null_in_a_file_without_an_entry_to_remove_is_refused(config_file):
    path = config_file("teacher: {run: x}\ndistill: {features: {mse: }}")
    expected = "distill.features.mse: null removes an entry, but no earlier file has it; for the defaults write mse: {}"
    assert mistakes("--config", path) == f"{expected} (in {path})"


def test_dotted_flag_creates_a_section(config_file):
    assert parse("--teacher.run", "x").teacher.run == "x"
    path = config_file("teacher: null\ndistill: {logits: null, label_weight: 1.0}")
    config = parse("--config", path, "--teacher.run=x", "--distill.logits.args.t_squared=false")
    assert config.teacher.run == "x"
    assert config.distill.logits == LogitLossConfig(args={"t_squared": False})


def test_null_removes_a_section(config_file):
    path = config_file("teacher: {run: x}\ndistill: {alpha: 0.3}\ndata: {views: 3}")
    config = parse("--config", path, "--teacher=null", "--distill=None", "--data.views=None")
    assert (config.teacher, config.distill, config.data.views) == (None, None, None)


def test_number_overrides_a_schedule_and_the_reverse(config_file):
    path = config_file(
        {"teacher": {"run": "x"}, "distill": {"temperature": {"start": 0.5, "floor": 0.3, "decay": 0.95}, "alpha": 0.7}}
    )
    config = parse("--config", path, "--distill.alpha", "0.6", "--distill.temperature.floor=0.4")
    assert config.distill.temperature == Schedule(start=0.5, floor=0.4, decay=0.95)
    assert config.distill.alpha == 0.6
    assert parse("--config", path, "--distill.temperature=2").distill.temperature == 2.0


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--optim.nesterov=True", "optim.nesterov", True),
        ("--optim.nesterov=true", "optim.nesterov", True),
        ("--train.channels_last=False", "train.channels_last", False),
        ("--optim.lr=1e-05", "optim.lr", 1e-5),
        ("--optim.lr=1", "optim.lr", 1.0),
        ("--optim.clip_norm=None", "optim.clip_norm", None),
        ("--checkpoint.every_epochs=null", "checkpoint.every_epochs", None),
        ("--data.std=[0.1, 1e-1, 1]", "data.std", [0.1, 0.1, 1.0]),
        ("--tracking.tags=['a', 'b']", "tracking.tags", ["a", "b"]),
        ("--model.arch_args={'a': None, 'b': [1, None], 'c': True}", "model.arch_args", {"b": [1, None], "c": True}),
        ("--model.arch_args.drop_rate=1e-1", "model.arch_args", {"drop_rate": 0.1}),
        ("--tracking.project=123", "tracking.project", "123"),
        ("--name=2024", "name", "2024"),
        ("--name=no", "name", "no"),
        ("--tracking.group={a: b}", "tracking.group", "{a: b}"),
        ("--tracking.group=1e3", "tracking.group", "1e3"),
    ],
)
def test_values_as_people_and_sweep_tools_write_them(flag, name, value):
    mean = ["--data.mean=[0, 0, 0]"] if "std" in flag else []
    found = parse(flag, *mean)
    for key in name.split("."):
        found = getattr(found, key)
    assert found == value and type(found) is type(value)


def test_schedule_as_a_sweep_tool_writes_it():
    flag = "--distill.alpha={'start': 0.4, 'kind': 'linear', 'end': 0.1, 'length': None}"
    assert parse("--teacher.run=x", flag).distill.alpha == Schedule(start=0.4, kind="linear", end=0.1)


def test_exponents_in_a_file_are_numbers(config_file):
    config = parse("--config", config_file("optim: {lr: 1e-3}\ndata: {mean: [1e-1, 0.2, 0.3], std: [1, 1, 1]}"))
    assert (config.optim.lr, config.data.mean) == (0.001, [0.1, 0.2, 0.3])


def test_saved_config_is_loaded_unchanged(tmp_path):
    config = parse(
        "--teacher.run=x",
        "--distill.features.mse.weight={start: 1e-3, kind: cosine, end: 0}",
        "--distill.features.other={loss: mse, layers: {a: b}, args: {x: '1e-3', y: 'no', z: [1, null]}}",
        "--name=1e-3",
        "--tracking.tags=['2024', 'null']",
        "--data.mean=[0.1,0.2,0.3]",
        "--data.std=[1,1,1]",
    )
    assert config.distill.features["other"].args == {"x": "1e-3", "y": "no", "z": [1, None]}
    save_config(config, tmp_path / "config.yaml")
    assert load_config_file(RunConfig, tmp_path / "config.yaml") == config


def test_printed_config_is_loaded_unchanged(tmp_path, capsys):
    flags = ["--teacher.run=x", "--distill.features.mse={}", "--optim.lr=3"]
    with pytest.raises(SystemExit) as stopped:
        parse(*flags, "--print_config")
    assert stopped.value.code == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert parse("--config", str(path)) == parse(*flags)


def build(source, config_class=RunConfig, **overrides):
    return build_config(config_class, source, overrides, losses=LOSSES)


def test_config_from_python(config_file, nothing_allowed):
    layers = {"layer1.0": "layer2.0"}
    source = {"teacher": {"run": "null"}, "distill": {"features": {"import:a.b:C": {"layers": layers, "args": {"x": "1e-3"}}}}}
    config = build(source, **{"optim.lr": 0.5, "distill.features.mse.weight": 0.2, "seed": 3})
    assert config.distill.features == {
        "import:a.b:C": FeatureLossConfig(layers=layers, args={"x": "1e-3"}),
        "mse": FeatureLossConfig(weight=0.2),
    }
    assert (config.teacher.run, config.optim.lr, config.seed) == ("null", 0.5, 3)
    assert build({"data": {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1)}}, run_dir=Path("x/y")).run_dir == "x/y"
    assert build(config, seed=4) == config.model_copy(update={"seed": 4})
    assert build(config_file("seed: 7"), name="y").seed == 7
    assert build(config, **{"distill.features.mse": None}).distill.features.keys() == {"import:a.b:C"}


def test_mistakes_of_a_config_from_python(nothing_allowed):
    with pytest.raises(UserError) as caught:
        build({"seed": "3", "trian": {"epochs": 1}}, **{"optim.lrr": 1})
    assert str(caught.value) == (
        "3 mistakes:\n  seed: must be an integer, not '3' (in the call)\n"
        "  optim.lrr: no such setting; did you mean optim.lr? (in the call)\n"
        "  trian: no such setting; did you mean train? (in the call)"
    )


def test_suggestions_for_a_config_from_python(nothing_allowed):
    with pytest.raises(UserError) as caught:
        build({}, lr=0.1)
    assert str(caught.value) == "lr: no such setting; did you mean optim.lr? (in the call)"
    with pytest.raises(UserError) as caught:
        build({"optim.lr": 0.1})
    assert str(caught.value) == "optim.lr: no such setting; did you mean optim: {lr: ...}? (in the call)"


def test_schema_is_strict_and_frozen():
    with pytest.raises(ValidationError):
        DistillConfig(feature=1)
    with pytest.raises(ValidationError):
        RunConfig(seed=True)
    with pytest.raises(ValidationError):
        RunConfig().seed = 3
    assert RunConfig().model_copy(update={"seed": 3}).seed == 3


def test_flatten_returns_dotted_names():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


def test_user_code_is_allowed_only_if_its_name_was_typed(config_file, nothing_allowed):
    path = config_file("data: {source: import:a:b}")
    assert "run.yaml names 'import:a:b'" in mistakes("--config", path)
    assert parse("--config", path, "--data.source=import:c:d").data.source == "import:c:d"
    assert "run.yaml names 'import:a:b'" in mistakes("--config", path), "typing another name does not allow this one"
    assert parse("--config", path, "--data.source=import:a:b").data.source == "import:a:b"


@pytest.mark.parametrize(
    "flag",
    [
        "--distill.features.mine.loss=import:a:B",
        "--distill.features={mine: {loss: 'import:a:B'}}",
        "--distill.features={'import:a:B': {weight: 1}}",
        "--distill.logits.loss=import:a:B",
    ],
)
def test_loss_of_user_code_is_accepted_by_name(config_file, nothing_allowed, flag):
    assert "import:a:B" in str(parse("--teacher.run=x", flag).distill)
