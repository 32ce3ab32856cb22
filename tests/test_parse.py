"""Mistakes in a config: all of them at once, by name, with the nearest key, before torch is loaded."""

import subprocess
import sys
import time

import pytest
import yaml

from kd_accel.config import BenchConfig, ReproduceConfig, RunConfig, Schedule
from kd_accel.parse import build_parser, flatten, load_config_file, parse_config, save_config
from kd_accel.types import UserError


def parse(*argv):
    return parse_config(RunConfig, argv, parser=build_parser(RunConfig, prog="kd-accel train", description=""))[0]


def mistakes(*argv):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path):
    def write(settings, name="run.yaml"):
        path = tmp_path / name
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        return str(path)

    return write


def test_later_files_and_then_flags_win(config_file):
    first = config_file({"seed": 1, "optim": {"lr": 0.1, "weight_decay": 0.5}, "train": {"epochs": 3}}, "a.yaml")
    second = config_file({"seed": 2, "optim": {"lr": 0.2}}, "b.yaml")
    config = parse("--config", first, "--config", second, "--optim.lr", "5e-1")
    assert (config.seed, config.optim.lr, config.optim.weight_decay, config.train.epochs) == (2, 0.5, 0.5, 3)


def test_a_number_or_a_schedule(config_file):
    path = config_file(
        {"teacher": {"run": "x"}, "distill": {"temperature": {"start": 0.5, "floor": 0.3, "decay": 0.95}, "alpha": 0.7}}
    )
    config = parse("--config", path, "--distill.alpha", "0.6")
    assert config.distill.temperature == Schedule(start=0.5, floor=0.3, decay=0.95)
    assert config.distill.alpha == 0.6


def test_a_saved_config_reads_back_equal(tmp_path):
    config = parse(
        "--teacher.run", "x", "--distill.feature.weight", "0.2", "--data.mean", "[0.1,0.2,0.3]", "--data.std", "[1,1,1]"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config_file(RunConfig, tmp_path / "config.yaml") == config


def test_all_mistakes_come_together_with_the_nearest_key(config_file):
    path = config_file({"optim": {"lr": "fast", "momentun": 0.9}, "distil": {"alpha": 1}, "train": {"epochs": 0}})
    text = mistakes("--config", path, "--trian.epochs", "3", "--seed=x")
    for part in (
        "6 mistakes",
        "optim.lr: Expected a float",
        "did you mean optim.momentum?",
        "did you mean distill?",
        "did you mean train?",
        "train.epochs: 0 must be at least 1",
        "seed: Expected a int",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data.source", "floppy"], "data.source: 'floppy' must be"),
        (["--data.val_fraction", "1"], "data.val_fraction"),
        (["--data.views", "0"], "data.views: 0 must be at least 1"),
        (["--data.mean", "[0.5,0.5,0.5]"], "give both or none"),
        (["--data.mean", "[0.5]", "--data.std", "[1,1,1]"], "three numbers"),
        (["--data.mean", "[0,0,0]", "--data.std", "[0,1,1]"], "must be above 0"),
        (["--data.augment", "flip"], "data.augment"),
        (["--model.arch", "resnet18"], "model.arch: 'resnet18' must start with"),
        (["--name", "a/b"], "name: 'a/b' must be a plain directory name"),
        (["--distill.alpha", "0.5"], "distill: has no effect without a teacher"),
        (["--teacher.run", "x", "--teacher.arch", "torchvision/resnet50"], "give either teacher.run"),
        (["--teacher.run", "x", "--teacher.stem", "cifar"], "teacher.stem: has no effect"),
        (["--teacher.arch", "torchvision/resnet50"], "must have learned something"),
        (["--teacher.run", "x", "--role", "teacher"], "role: teacher has no effect"),
        (["--teacher.run", "x", "--distill.alpha", "1.5"], "distill.alpha: 1.5 must be at most 1"),
        (["--teacher.run", "x", "--distill.temperature", "0"], "distill.temperature: 0.0 must be above 0"),
        (["--teacher.run", "x", "--distill.alpha.start", "0.5"], "distill.alpha.floor: missing"),
        (
            ["--teacher.run", "x", "--distill.alpha", '{"kind": "linear", "start": 1, "end": 0, "decay": 0.5}'],
            "distill.alpha.decay: has no effect with kind linear",
        ),
        (
            ["--teacher.run", "x", "--distill.feature.weight", "0"],
            "distill.feature.weight: 0, so the term has no effect",
        ),
        (["--teacher.run", "x", "--distill.feature.taps", "[a, a]"], "each once"),
        (["--teacher.run", "x", "--teacher.taps", "[a]", "--distill.feature.weight", "0.1"], "they are pairs"),
        (["--teacher.run", "x", "--distill.feature.teacher_projector", "learned"], "teacher_projector: has no effect"),
        (["--optim.lr", "0"], "optim.lr: 0.0 must be above 0"),
        (["--optim.name", "adamw", "--optim.nesterov", "true"], "optim.nesterov: has no effect (with optimizer adamw)"),
        (["--optim.betas", "[0.9, 0.99]"], "optim.betas: has no effect (with optimizer sgd)"),
        (["--optim.step_epochs", "[3]"], "optim.step_epochs: has no effect (with onecycle)"),
        (["--optim.schedule", "step"], "optim.step_epochs: empty"),
        (["--optim.warmup_fraction", "1"], "optim.warmup_fraction"),
        (["--optim.clip_norm", "0"], "optim.clip_norm"),
        (["--train.batch_size", "10", "--train.grad_accum_steps", "4"], "does not divide by train.grad_accum_steps"),
        (["--train.ema_decay", "1"], "train.ema_decay"),
        (["--train.precision", "fp8"], "train.precision"),
        (["--checkpoint.keep", "0"], "checkpoint.keep: 0 must be at least 1"),
        (["--checkpoint.resume", "maybe"], "checkpoint.resume"),
        (["--tracking.timeout_s", "0"], "tracking.timeout_s"),
    ],
)
def test_each_rule_names_field_value_and_rule(flags, part):
    assert part in mistakes(*flags)


@pytest.mark.parametrize(
    ("content", "part"),
    [("a: [1", "is not YAML"), ("- 1\n- 2\n", "must hold settings"), (b"\xff\xfe\x00", "cannot read")],
)
def test_a_file_that_is_no_config(tmp_path, content, part):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert part in mistakes("--config", str(path))


def test_a_missing_file():
    assert "cannot read nowhere.yaml" in mistakes("--config", "nowhere.yaml")


def test_required_fields_of_a_chain():
    with pytest.raises(UserError, match="runs"):
        parse_config(ReproduceConfig, [], parser=build_parser(ReproduceConfig, prog="x", description=""))


@pytest.mark.parametrize(
    ("kind", "prefix", "flags"),
    [
        (BenchConfig, "", []),
        (ReproduceConfig, "bench.", ["--runs=[a.yaml]", "--launch=x", "--report_dir=y"]),
    ],
)
def test_impossible_measurements(kind, prefix, flags):
    flags = [*flags, f"--{prefix}batch_sizes=[1, 0]", f"--{prefix}threads=0"]
    with pytest.raises(UserError) as caught:
        parse_config(kind, flags, parser=build_parser(kind, prog="x", description=""))
    assert f"{prefix}threads: 0 must be at least 1" in str(caught.value)
    assert f"{prefix}batch_sizes: [1, 0] must list at least one number, each at least 1" in str(caught.value)


def test_an_abbreviation_is_a_misspelt_key():
    assert "train.epoch: no such setting; did you mean train.epochs?" in mistakes("--train.epoch=1")


def test_flatten_gives_the_names_that_a_person_types():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


def run_program(*argv):
    started_at = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "kd_accel", *argv], capture_output=True, text=True, check=False)
    return done, time.perf_counter() - started_at


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--optim.lrr", "1"], 2),
        (["train", "--config", "nowhere.yaml"], 2),
        (["trian"], 2),
        (["report"], 2),
        (["bench", "--batch_sizes", "many"], 2),
        (["reproduce", "--runs", "[nowhere.yaml]", "--launch", "pyproject.toml", "--report_dir", "x"], 2),
    ],
)
def test_the_program_answers_at_once_without_a_traceback(argv, code):
    done, elapsed_s = min((run_program(*argv) for _ in range(2)), key=lambda result: result[1])
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert elapsed_s < 1.5
    assert (done.stderr.startswith("kd-accel: ") and done.stdout == "") if code else done.stdout
