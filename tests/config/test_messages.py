"""Messages for mistakes in settings: all in one message, each with its name, its origin and a remedy."""

import pytest

from kd_accel.config.schema import BenchConfig, ReproduceConfig
from tests.support.parsing import mistakes, parse

CHAIN = ["--runs=[a.yaml]", "--launch=x", "--report_dir=y"]


def test_all_mistakes_come_together_with_the_nearest_name(config_file):
    path = config_file({"optim": {"lr": "fast", "momentun": 0.9}, "distil": {"alpha": 1}, "train": {"epochs": 0}})
    text = mistakes("--config", path, "--trian.batch_size", "3", "--seed=x", "--distill.features.mze={}")
    for part in (
        "8 mistakes",
        f"optim.lr: must be a number, not 'fast' (in {path})",
        f"optim.momentun: no such setting; did you mean optim.momentum? (in {path})",
        f"distil: no such setting; did you mean distill? (in {path})",
        "distill: has no effect without a teacher",
        "--trian.batch_size: no such setting; did you mean --train.batch_size?",
        f"train.epochs: 0 must be at least 1 (in {path})",
        "seed: must be an integer, not 'x' (on the command line)",
        "distill.features.mze: 'mze' is not the name of a loss between features; did you mean mse?",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--sed=1", "--sed: no such setting; did you mean --seed?"),
        ("--train.epoch=1", "--train.epoch: no such setting; did you mean --train.epochs?"),
        ("--teacher.cache.dtyp=int8", "--teacher.cache.dtyp: no such setting; did you mean --teacher.cache.dtype?"),
        (
            "--distill.temperature.flor=1",
            "--distill.temperature.flor: no such setting; did you mean --distill.temperature.floor?",
        ),
        ("--distill.logits.los=kl", "--distill.logits.los: no such setting; did you mean --distill.logits.loss?"),
        ("--distill.features.mse.wieght=1", "no such setting; did you mean --distill.features.mse.weight?"),
        ("--distill.features.mse.layer=[a]", "did you mean --distill.features.mse.layers?"),
        ("--model.nothing.like.this=1", "--model.nothing.like.this: no such setting; --help lists all settings"),
    ],
)
def test_misspelled_name_at_any_depth_is_recognized(flag, expected):
    assert expected in mistakes(flag)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1", "is not valid YAML (line 1, column 6: expected ',' or ']'"),
        ("- 1\n- 2\n", "holds a list; it must hold settings as `key: value`"),
        ("# nothing\n", "holds nothing; it must hold settings"),
        ("optim:\n  lr: 0.1\n  lr: 0.2\n", "(line 3, column 3: duplicate key lr"),
        ("name: 2024-13-45\n", "(month must be in 1..12)"),
        (b"\xff\xfe\x00", "is not valid YAML ('utf-8'"),
    ],
)
def test_file_that_is_not_a_config_is_refused(tmp_path, content, part):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert part in mistakes("--config", str(path))


def test_file_that_cannot_be_read_is_refused(tmp_path):
    assert mistakes("--config", "nowhere.yaml").startswith("config: file 'nowhere.yaml' not found; paths are relative")
    assert mistakes("--config", str(tmp_path)).endswith("(Is a directory); name a YAML file")
    assert mistakes("--config", "nowhere.yaml", config_class=ReproduceConfig).count("\n") == 0, "not also what is missing"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("optim: 3", "optim: must be settings as `key: value`, not 3"),
        ("data:", "data: must be settings as `key: value`, not null"),
        ("teacher: run", "teacher: must be settings as `key: value` or null, not 'run'; did you mean teacher: {run: ...}?"),
        ("data: {mean: [a, 1]}", "data.mean: must be a list (of each item: a number) or null, not ['a', 1]"),
        ("model: {arch_args: 3}", "model.arch_args: must be settings as `key: value`, not 3"),
        ("train: {epochs: 1.5}", "train.epochs: must be an integer, not 1.5"),
        ("teacher: {run: x}\ndistill: {features: 3}", "distill.features: must be settings as `key: value`, not 3"),
        ("seed: '3'", "seed: must be an integer, not '3'"),
        ("train: {compile: 3}", "train.compile: must be true or false, not 3"),
        ("train: {precision: no}", "train.precision: must be one of float32, bf16, fp16, not False"),
        ("name: 2024", "name: must be text, not 2024; put it in quotes"),
        ("tracking: {project: 123}", "tracking.project: must be text, not 123; put it in quotes"),
        ("tracking: {tags: [2024]}", "tracking.tags: must be a list (of each item: text), not [2024]; put it in quotes"),
        ("datä: {}", "datä: no such setting; did you mean data?"),
        ("3: 4", "3: no such setting; --help lists all settings"),
        (
            "teacher: {run: x}\ndistill: {alpha: fast}",
            "distill.alpha: must be a number or settings as `key: value`, not 'fast'",
        ),
        (
            "teacher: {run: x}\ndistill: {features: {mse: {layers: {a: 1}}}}",
            "distill.features.mse.layers.a: must be text, not 1; put it in quotes",
        ),
        (
            "teacher: {run: x}\ndistill: {features: {mse: {args: {a: {b: 1}}}}}",
            "distill.features.mse.args.a: must be a number, text, true, false, or a list of these, not {'b': 1}",
        ),
        (
            "teacher: {run: x}\ndistill: {features: {mse: 0.1}}",
            "distill.features.mse: must be settings as `key: value`, not 0.1",
        ),
    ],
)
def test_value_of_the_wrong_type_has_one_message(config_file, settings, expected):
    path = config_file(settings)
    assert mistakes("--config", path) == f"{expected} (in {path})"


@pytest.mark.parametrize("kind", [BenchConfig, ReproduceConfig])
def test_file_of_another_command_has_one_message(config_file, kind):
    path = config_file({"name": "x", "data": {}, "train": {"epochs": 3}})
    expected = f"config: {path} is a file of another command; none of its settings (data, name, train) is one of this command"
    assert mistakes("--config", path, config_class=kind) == expected


def test_misspelled_key_of_a_schedule_has_one_message(config_file):
    schedule = {"start": 0.5, "flor": 0.3, "decay": 0.95}
    path = config_file({"teacher": {"run": "x"}, "distill": {"temperature": schedule}})
    expected = "distill.temperature.flor: no such setting; did you mean distill.temperature.floor?"
    assert mistakes("--config", path) == f"{expected} (in {path})"
    flag = "--distill.temperature={start: 0.5, flor: 0.3, decay: 0.95}"
    assert mistakes("--teacher.run=x", flag) == expected.replace("distill.", "--distill.")


def test_schedule_without_its_start_is_refused(config_file):
    path = config_file({"teacher": {"run": "x"}, "distill": {"alpha": {"floor": 0.3, "decay": 0.95}}})
    assert mistakes("--config", path).startswith("distill.alpha.start: missing, and without a default")
    assert parse("--config", path, "--distill.alpha.start=0.4").distill.alpha.start == 0.4


def test_misspelled_setting_is_validated_under_the_nearest_name(config_file):
    path = config_file("teechr: {run: x}\ndistill: {alpha: 0.3}\nnam: 2024")
    text = mistakes("--config", path, "--optim.nam=adamw", "--optim.betas=[0.9, 0.99]")
    assert text.count("\n") == 4 and "name: must be text" in text and "teacher?" in text and "optim.name?" in text


def test_refused_value_is_not_reported_again_by_a_rule(config_file):
    path = config_file("teacher: {run: x, outputs: cached, cache: {dir: 3}}\ndata: {views: 2, mean: [0, 0, 0], std: 1}")
    text = mistakes("--config", path)
    assert text.startswith("2 mistakes:") and "teacher.cache.dir: must be text" in text and "data.std: must be a list" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--confg", "run.yaml"], "--confg: no such option; did you mean --config?"),
        (["--confg=run.yaml"], "--confg: no such option; did you mean --config?"),
        (["--print_confg"], "--print_confg: no such option; did you mean --print_config?"),
        (["--seed", "--name=x"], "--seed: a value is missing; write --seed VALUE"),
        (["--seed"], "--seed: a value is missing; write --seed VALUE"),
        (["--name", "[1", "--seed=x"], "seed: must be an integer, not 'x' (on the command line)"),
        (
            ["--optim.betas+=[0.5, 0.5]", "--optim.name=adamw"],
            "--optim.betas+: no such setting; did you mean --optim.betas?",
        ),
        (
            ["--data=run.yaml"],
            "data: must be settings as `key: value`, not 'run.yaml'; did you mean --data.source? (on the command line)",
        ),
        (["--seed="], "seed: must be an integer, not '' (on the command line)"),
        (["--seed=null"], "seed: must be an integer, not null (on the command line)"),
        (["--seed=" + "9" * 5000], f"seed: must be an integer, not '{'9' * 199}... (on the command line)"),
    ],
)
def test_mistake_on_the_command_line_has_one_message(flags, expected):
    assert mistakes(*flags) == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["-c", "run.yaml"],
            "-c: no such option; a config file is given as --config FILE, a setting as --a.b VALUE (usage: kd-accel x [FILE",
        ),
        (["-T", "4"], "-T: no such option; did you mean --distill.temperature? (usage: "),
        (["--config"], "--config: expected one argument (usage: "),
    ],
)
def test_short_option_or_missing_argument_is_refused(flags, expected):
    assert mistakes(*flags).startswith(expected)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--train.epochs=1"],
            "--train.epochs: is a setting of the trainings, not of the chain; write it after --, as in: -- --train.epochs=1",
        ),
        (
            ["--seed", "3"],
            "--seed: is a setting of the trainings, not of the chain; write it after --, as in: -- --seed=3",
        ),
        (
            ["--lr=3"],
            "--lr: is a setting of the trainings, not of the chain; write it after --, as in: -- --optim.lr=3",
        ),
        (["--num_seeds=0"], "num_seeds: 0 must be from 1 to 1000, or null (on the command line)"),
        (["--bench.thread=1"], "--bench.thread: no such setting; did you mean --bench.threads?"),
    ],
)
def test_flag_of_the_trainings_is_refused_by_the_chain(flags, expected):
    assert mistakes(*CHAIN, *flags, config_class=ReproduceConfig) == expected


def test_setting_of_a_training_in_the_file_of_a_chain_is_refused(config_file):
    path = config_file("train: {epochs: 1}")
    expected = f"train: is a setting of a training, not of the chain; move it into the files that `runs` lists (in {path})"
    assert mistakes(*CHAIN, "--config", path, config_class=ReproduceConfig) == expected


def test_missing_required_settings_are_reported():
    expected = "runs, launch, report_dir: missing, and without a default; set it in a config file or as a flag"
    assert mistakes(config_class=ReproduceConfig) == expected
