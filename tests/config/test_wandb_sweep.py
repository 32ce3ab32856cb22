"""The shipped sweep of W&B: its arguments are those of `kd-accel train`, and each trial has a directory of its own."""

import itertools
import os
import sys
from pathlib import Path

import pytest
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config
from wandb.wandb_agent import Agent

from kd_accel.config.parsing import parse_config
from kd_accel.config.schema import RunConfig
from kd_accel.config.wandb_sweep import agent_run_id, as_trial_of_agent
from tests.support.launching import ROOT, SMALL, summary

FILE = ROOT / "configs/digits/wandb_sweep.yaml"


def trials():
    """Arguments of each trial in the form in which W&B's server sends them."""
    parameters = load_sweep_config(str(FILE))["parameters"]
    for values in itertools.product(*(parameter["values"] for parameter in parameters.values())):
        yield {name: {"value": value} for name, value in zip(parameters, values, strict=True)}


def test_arguments_of_the_agent_are_accepted_for_all_trials(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    program, sweep = create_sweep_command(load_sweep_config(str(FILE))["command"]), list(trials())
    at = program.index("train")
    assert program[:at] == ["${env}", "${interpreter}", "-m", "${program}"] and program[-1] == "${args}" and len(sweep) == 12
    configs = []
    for number, arguments in enumerate(sweep):
        monkeypatch.setenv("WANDB_RUN_ID", f"run{number}")
        flags = create_sweep_command_args({"args": arguments})["args"]
        configs.append(as_trial_of_agent(parse_config(RunConfig, [f"--config={program[at + 1]}", *flags])[0]))
    assert len({(config.distill.temperature, config.distill.alpha, config.seed) for config in configs}) == 12
    assert [str(config.directory) for config in configs] == [f"runs/digits/hybrid_fixed-run{number}" for number in range(12)]
    assert configs[3].name == "digits-hybrid-fixed-run3"


def test_only_runs_of_an_agent_have_its_id(monkeypatch):
    config = RunConfig()
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    assert agent_run_id() is None and as_trial_of_agent(config) is config
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert str(as_trial_of_agent(config).directory) == f"runs/{config.name}-run1"
    monkeypatch.setenv("WANDB_RUN_ID", "../../x")
    assert str(as_trial_of_agent(config).directory) == f"runs/{config.name}-------x"


@pytest.mark.slow
def test_an_agent_trains_two_trials_in_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    changes = {"WANDB_SWEEP_ID": "sweep", "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    for name, value in {**changes, "WANDB_RUN_ID": "", "WANDB_SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    small = dict(flag[2:].split("=", 1) for flag in SMALL)
    small |= {"run_dir": str(tmp_path / "run"), "train.epochs": 1, "tracking.wandb": "offline"}
    plain = {"teacher": None, "distill": None, "model.arch_args.zero_init_residual": None}
    agent, sweep = Agent(None, None), load_sweep_config(str(FILE))
    agent._sweep_command = sweep["command"]
    for number, run_id in enumerate(("first123", "second12")):
        values = {**{name: {"value": value} for name, value in {**small, **plain}.items()}, "seed": {"value": number}}
        command = {"id": number, "type": "run", "run_id": run_id, "program": sweep["program"], "args": values}
        assert "exception" not in agent._process_command(command)
        assert agent._run_processes[run_id].wait(timeout=300) == 0
        assert summary(tmp_path / f"run-{run_id}")["name"] == f"digits-hybrid-fixed-{run_id}"
    assert not (tmp_path / "run").exists()
    ids = {path.name.rpartition("-")[2] for path in tmp_path.rglob("offline-run-*") if path.is_dir()}
    assert ids == {"first123", "second12"}
