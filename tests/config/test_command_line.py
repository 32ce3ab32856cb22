"""The program's command line: arguments of the commands, and errors at once, without torch and without a traceback."""

import inspect
import resource
import subprocess
import sys

import pytest

import kd_accel.commands
from kd_accel.cli import main
from tests.support.launching import environment


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["report", "run"], "missing: --out (usage: kd-accel report RUN ... --out DIR [--bench FILE])"),
        (["report"], "missing: RUN, --out (usage: kd-accel report RUN ... --out DIR [--bench FILE])"),
        (["evaluate", "a", "b"], "b: one argument too many (usage: kd-accel evaluate RUN [--split test|val])"),
        (["evaluate", "a", "--splt=val"], "--splt: no such option; did you mean --split? (usage: kd-accel evaluate"),
        (
            ["evaluate", "a", "--split=vall"],
            "--split: invalid choice: 'vall' (choose from 'test', 'val') (usage: kd-accel evaluate",
        ),
        (["evaluate", "a", "--split"], "--split: expected one argument (usage: kd-accel evaluate"),
        (["bench"], "missing: RUN_OR_ARCH (usage: kd-accel bench RUN_OR_ARCH ... [--out FILE] [--config FILE ...]"),
        (["bench", "x", "--batch_sizes", "many"], "batch_sizes: must be a list (of each item: a whole number), not 'many'"),
        (["bench", "x", "--ot=y"], "--ot: no such option; did you mean --out?"),
        (["reproduce", "chain.yaml"], "chain.yaml: stands alone; a config file is given as --config FILE"),
        (["plan", "--jsn"], "--jsn: no such option; did you mean --json?"),
        (["plan", "--json", "--sed=3"], "sed: no such setting; did you mean seed?"),
        (["cache", "biuld"], "cache 'biuld' is not a command; did you mean build? (build, verify or info)"),
        (["trian"], "'trian' is not a command; did you mean train? (commands: train, cache, plan"),
        (
            ["train", "--teacher.run=x", "--distill.features.mze={}"],
            "not the name of a loss between features; did you mean mse?",
        ),
        (["train", "--teacher.run=x", "--distill.logits.loss=kll"], "not the name of a loss between logits; did you mean kl?"),
    ],
)
def test_arguments_of_a_command(argv, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kd-accel: ") and told in line


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        (["a", "--split=val"], {"split": "val"}),
        (["a"], {"split": "test"}),
        (["--split", "val", "a"], {"split": "val"}),
    ],
)
def test_arguments_reach_the_command(monkeypatch, argv, values):
    seen = {}
    module = type(sys)("kd_accel.commands.evaluate")
    module.run_evaluation = lambda run, **given: seen.update(given, run=str(run))
    monkeypatch.setitem(sys.modules, "kd_accel.commands.evaluate", module)
    main(["evaluate", *argv])
    assert seen == {"run": "a", **values}


def test_settings_and_arguments_in_any_order(monkeypatch):
    seen = {}
    module = type(sys)("kd_accel.commands.bench")
    module.run_bench = lambda models, config, out: seen.update(models=models, threads=config.threads, out=str(out))
    monkeypatch.setitem(sys.modules, "kd_accel.commands.bench", module)
    main(["bench", "a", "--threads", "2", "b", "--out", "c", "--min_time_s=0.5"])
    assert seen == {"models": ["a", "b"], "threads": 2, "out": "c"}


def test_two_calls_lead_from_main_to_the_command(monkeypatch):
    module = type(sys)("kd_accel.commands.train")
    names = []
    module.run_training = lambda config: names.extend(frame.function for frame in inspect.stack()[1:4])
    monkeypatch.setitem(sys.modules, "kd_accel.commands.train", module)
    monkeypatch.setattr(kd_accel.commands, "train", module, raising=False)
    main(["train"])
    assert names[:2] == ["_train", "main"] and names[2].startswith("test_")


LIMIT_CPU_S = 0.5
"""Processor time, which is the whole time on an idle machine, and hardly more on a busy one."""


def run_program(*argv):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "kd_accel", *argv]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = done.stderr.splitlines(keepends=True)
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    errors = "".join(line for line in lines if not line.startswith("import time:"))
    return done, imported, errors, cpu_s


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
    done, imported, errors, cpu_s = run_program(*argv)
    cpu_s = cpu_s if cpu_s < LIMIT_CPU_S else run_program(*argv)[-1]  # the first import of a checkout also compiles
    assert done.returncode == code
    assert "Traceback" not in errors
    assert not {"torch", "numpy", "accelerate"} & imported and "pydantic" in imported
    assert cpu_s < LIMIT_CPU_S
    assert (errors.startswith("kd-accel: ") and done.stdout == "") if code else done.stdout
