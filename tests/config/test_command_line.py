"""Command line of the program: arguments and config files of the commands, fast errors without traceback, a closed stdout."""

import inspect
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import kd_accel.commands
from kd_accel.cli import main
from tests.support.launching import ROOT, SMALL, environment


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["report", "run"], "missing: --out (usage: kd-accel report RUN ... --out DIR [--bench FILE])"),
        (["report"], "missing: RUN, --out (usage: kd-accel report RUN ... --out DIR [--bench FILE])"),
        (
            ["evaluate", "a", "--split=val", "b"],
            "b: unexpected argument (usage: kd-accel evaluate RUN ... [--split test|val] [--out FILE] [--a.b VALUE ...])",
        ),
        (["predict", "a"], "missing: FILE (usage: kd-accel predict RUN FILE ... [--top_k N] [--batch_size N] [--out FILE])"),
        (["evaluate", "a"], "a/config.yaml: is missing: no finished run in this directory; train it first"),
        (
            ["evaluate", "a", "--split=vall"],
            "--split: invalid choice: 'vall' (choose from 'test', 'val') (usage: kd-accel evaluate",
        ),
        (["evaluate", "a", "--split"], "--split: expected one argument (usage: kd-accel evaluate"),
        (["bench"], "missing: RUN_OR_ARCH (usage: kd-accel bench RUN_OR_ARCH ... [--out FILE] [--config FILE ...]"),
        (["bench", "x", "--batch_sizes", "many"], "batch_sizes: must be a list (of each item: an integer), not 'many'"),
        (["bench", "x", "--ot=y"], "--ot: no such option; did you mean --out?"),
        (["reproduce", "chain.yaml"], "config: file 'chain.yaml' not found; paths are relative to the working directory"),
        (["plan", "--jsn"], "--jsn: no such option; did you mean --json?"),
        (["plan", "--json", "--sed=3"], "--sed: no such setting; did you mean --seed?"),
        (["cache", "biuld"], "cache 'biuld' is not a command; did you mean build? (build, verify or info)"),
        (["trian"], "'trian' is not a command; did you mean train? (commands: train, cache, data, plan"),
        (
            ["train", "--teacher.run=x", "--distill.features.mze={}"],
            "not the name of a loss between features; did you mean mse?",
        ),
        (["train", "--teacher.run=x", "--distill.logits.loss=kll"], "not the name of a loss between logits; did you mean kl?"),
    ],
)
def test_wrong_arguments_are_refused(argv, expected, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kd-accel: ") and expected in line


@pytest.mark.parametrize(
    ("argv", "split", "source"),
    [
        (["a", "--split=val"], "val", "import:a:b"),
        (["a"], "test", "import:a:b"),
        (["--split", "val", "--data.source", "imagefolder:c", "a"], "val", "imagefolder:c"),
    ],
)
def test_arguments_reach_the_command(monkeypatch, tmp_path, argv, split, source):
    seen = {}
    module = type(sys)("kd_accel.commands.evaluate")
    module.run_evaluations = lambda runs, configs, split, out: seen.update(
        run=str(*runs), source=[config.data.source for config in configs], split=split, out=out
    )
    monkeypatch.setitem(sys.modules, "kd_accel.commands.evaluate", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("data: {source: import:a:b}")
    main(["evaluate", *argv])
    assert seen == {"run": "a", "source": [source], "split": split, "out": None}


def test_settings_and_arguments_are_accepted_in_any_order(monkeypatch):
    seen = {}
    module = type(sys)("kd_accel.commands.bench")
    module.run_bench = lambda models, config, out: seen.update(models=models, threads=config.threads, out=str(out))
    monkeypatch.setitem(sys.modules, "kd_accel.commands.bench", module)
    main(["bench", "a", "--threads", "2", "b", "--out", "c", "--min_time_s=0.5"])
    assert seen == {"models": ["a", "b"], "threads": 2, "out": "c"}


@pytest.fixture
def called(monkeypatch):
    """Replace the commands that take a config, and return the config that was passed last."""
    configs = []
    module = type(sys)("replaced")
    for name in ("run_training", "run_plan", "run_cache_build", "run_cache_verify", "run_cache_info", "run_chain"):
        setattr(module, name, lambda config, **_: configs.append(config))
    for name in ("train", "plan", "cache", "reproduce"):
        monkeypatch.setitem(sys.modules, f"kd_accel.commands.{name}", module)
        monkeypatch.setattr(kd_accel.commands, name, module, raising=False)
    return configs


@pytest.mark.parametrize("command", ["train", "plan", "plan --json", "cache build", "cache verify --json", "cache info"])
def test_positional_arguments_are_config_files(called, config_file, command):
    first, second = config_file({"seed": 1, "optim": {"lr": 0.3}}, "a.yaml"), config_file({"seed": 2}, "b.yaml")
    main([*command.split(), first, second, "--train.epochs", "3"])
    main([*command.split(), "--config", first, "--config", second, "--train.epochs", "3"])
    assert called[0] == called[1] and (called[0].seed, called[0].optim.lr, called[0].train.epochs) == (2, 0.3, 3)


def test_chain_is_given_as_a_positional_file(called, config_file):
    chain = config_file({"runs": ["a.yaml"], "launch": "launch/cpu2.yaml", "report_dir": "x"})
    main(["reproduce", chain, "--report_dir=y", "--", "--train.epochs=1"])
    assert (called[0].runs, called[0].report_dir) == (["a.yaml"], "y")


def test_a_command_is_two_calls_below_main(monkeypatch):
    module = type(sys)("kd_accel.commands.train")
    names = []
    module.run_training = lambda config: names.extend(frame.function for frame in inspect.stack()[1:4])
    monkeypatch.setitem(sys.modules, "kd_accel.commands.train", module)
    monkeypatch.setattr(kd_accel.commands, "train", module, raising=False)
    main(["train"])
    assert names[:2] == ["_train", "main"] and names[2].startswith("test_")


LIMIT_RATIO = 2.7
"""Limit of the processor time, relative to that of Python importing the two libraries without which no config can be read.

The elapsed time would depend on the load of the machine, and seconds on its kind. Where the imports take 0.25 s, a start takes
0.6 s. The least of three ratios counts, because the first import of a checkout also compiles.
"""


def run_python(*argv):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", *argv]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run_program(*argv):
    done, cpu_s = run_python("-m", "kd_accel", *argv)
    ratio = cpu_s / run_python("-c", "import pydantic.main, yaml")[1]
    lines = done.stderr.splitlines(keepends=True)
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    errors = "".join(line for line in lines if not line.startswith("import time:"))
    return done, imported, errors, ratio


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["train", "--print_config"], 0),
        (["train", "--optim.lrr", "1"], 2),
        (["train", "--teacher.run=x", "--distill.features.mze.weight=1"], 2),
        (["train", "--config", "nowhere.yaml"], 2),
        (["trian"], 2),
        (["report"], 2),
        (["reproduce"], 2),
        (["bench", "--batch_sizes", "many"], 2),
        (["reproduce", "--runs", "[nowhere.yaml]", "--launch", "launch/cpu2.yaml", "--report_dir", "x"], 2),
    ],
)
def test_the_program_ends_at_once_without_a_traceback(argv, code):
    done, imported, errors, ratio = run_program(*argv)
    for _ in range(2):
        ratio = ratio if ratio < LIMIT_RATIO else run_program(*argv)[-1]
    assert done.returncode == code
    assert "Traceback" not in errors
    assert not {"torch", "numpy", "accelerate"} & imported and "pydantic" in imported
    assert ratio < LIMIT_RATIO
    assert (errors.startswith("kd-accel: ") and done.stdout == "") if code else done.stdout


LIKE_HEAD = """
import subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=subprocess.PIPE)
sys.stdout.buffer.write(process.stdout.readline())
process.stdout.close()
sys.exit(process.wait())
"""
"""Program that starts another, reads its first line and closes the pipe, as `head -1` does."""


@pytest.mark.parametrize("buffering", ["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--print_config"],
        pytest.param(["losses"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_closed_stdout_ends_the_program_without_a_message(argv, buffering):
    reader, writer = os.pipe()
    os.close(reader)
    changes = {"PYTHONUNBUFFERED": "1" if buffering == "unbuffered" else ""}
    command = [sys.executable, "-m", "kd_accel", *argv]
    with open(writer, "wb") as stdout:
        done = subprocess.run(
            command, env=environment(**changes), stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (128 + 13, "")


def test_first_line_can_be_read_alone():
    """The code depends on whether the rest was written before the pipe was closed."""
    command = [sys.executable, "-c", LIKE_HEAD, "-m", "kd_accel", "train", "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.stdout == "usage: kd-accel train [--seeds N] [FILE ...] [--a.b VALUE ...]\n"
    assert done.returncode in (0, 141) and done.stderr == ""


@pytest.mark.slow
def test_training_ends_when_its_stdout_is_closed(tmp_path):
    command = [sys.executable, "-c", LIKE_HEAD, "-m", "kd_accel", "train", f"--run_dir={tmp_path / 'run'}", *SMALL]
    done = subprocess.run(
        [*command, "--train.epochs=100"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 141 and done.stderr == ""
    assert done.stdout.startswith("run  ") and not (tmp_path / "run/summary.json").exists()


def test_mistake_is_reported_with_a_closed_stdout():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "kd_accel", "trian"]
    with open(writer, "wb") as stdout:
        done = subprocess.run(command, env=environment(), stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and "did you mean train?" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_under_stdout_is_a_message():
    command = [sys.executable, "-m", "kd_accel", "--help"]
    with open("/dev/full", "wb") as stdout:
        changes = environment(PYTHONUNBUFFERED="")
        done = subprocess.run(command, env=changes, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("kd-accel: stdout: cannot write (No space left on device)") and done.stderr.count("\n") == 1


def test_broken_pipe_elsewhere_is_an_error(monkeypatch, capfd):
    module = type(sys)("kd_accel.commands.train")

    def fail(config):
        raise BrokenPipeError("a socket")

    module.run_training = fail
    monkeypatch.setitem(sys.modules, "kd_accel.commands.train", module)
    monkeypatch.setattr(kd_accel.commands, "train", module, raising=False)
    with pytest.raises(BrokenPipeError, match="a socket"):
        main(["train"])
