"""Run directory of a trial that `wandb agent` has started.

The agent starts all trials of a sweep of W&B with the same config file, and with the id of the trial in the environment. This
id becomes a part of the trial's name and directory, so that each trial has a directory of its own, and a trial that the agent
starts again resumes.
"""

from __future__ import annotations

import os
import re

from kd_accel.config.schema import RunConfig


def agent_run_id() -> str | None:
    """Return the id that `wandb agent` has given to this run; None for a run that it has not started."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def as_trial_of_agent(config: RunConfig) -> RunConfig:
    """Return the config with the id of the trial in its name and directory; the same config outside of `wandb agent`."""
    run_id = agent_run_id()
    if not run_id:
        return config
    suffix = f"-{re.sub(r'[^A-Za-z0-9_-]', '-', run_id)}"
    run_dir = f"{config.directory}{suffix}" if config.run_dir else None
    return config.model_copy(update={"name": f"{config.name}{suffix}", "run_dir": run_dir})
