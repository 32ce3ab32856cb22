"""Files of a sweep: the config of each run, the table of the finished runs, and the best config. torch is not imported."""

from __future__ import annotations

from pathlib import Path

import yaml

from kd_accel.config.parsing import save_config
from kd_accel.config.paths import absolute_paths
from kd_accel.config.schema import RunConfig
from kd_accel.config.sweep import Sweep, value_text
from kd_accel.errors import UserError
from kd_accel.io.files import refused_by_disk, write_whole
from kd_accel.io.safe_yaml import dump_yaml, load_yaml_file
from kd_accel.report.sweep_table import TrialResult, best_trial, read_run, write_sweep_report
from kd_accel.training.resume_settings import refused_changes


def has_results(run: RunConfig) -> bool:
    """Return whether a run is finished."""
    return (run.directory / "summary.json").is_file()


def refuse_other_results(run: RunConfig) -> None:
    """Raise UserError if a finished run has other settings, so that its accuracy is not that of the trial."""
    path = run.directory / "config.yaml"
    remedy = "set them back, or give the sweep another --out"
    try:
        stored = load_yaml_file(path)
        changed = refused_changes(absolute_paths(stored), absolute_paths(run.model_dump(mode="json")), is_finished=True)
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        raise UserError(f"{path}: of a finished run, is missing or damaged; remove the directory to train it again") from None
    if others := [text for name, text in changed.items() if not _is_automatic(run, name)]:
        raise UserError(f"{path}: a finished run of the sweep has other settings: {'; '.join(others)}; {remedy}")


def _is_automatic(run: RunConfig, name: str) -> bool:
    """Return whether a setting is the layers of a feature loss that the run chooses itself; its config.yaml has their names."""
    features = run.distill.features if run.distill else {}
    automatic = [f"distill.features.{loss}.layers" for loss, settings in features.items() if settings.layers == "auto"]
    return any(f"{name}.".startswith(f"{layers}.") for layers in automatic)


def config_file(sweep: Sweep, run: RunConfig) -> Path:
    """Return the path of the config of a run."""
    return sweep.directory / "configs" / f"{run.name}.yaml"


def write_configs(sweep: Sweep, runs: list[RunConfig]) -> None:
    """Write the configs of some runs. Raises UserError if the directory of the sweep cannot be written."""
    try:
        (sweep.directory / "configs").mkdir(parents=True, exist_ok=True)
        for run in runs:
            save_config(run, config_file(sweep, run))
    except OSError as error:
        raise UserError(f"--out: {refused_by_disk(error)}") from None


def write_results(sweep: Sweep) -> str:
    """Write the table of the finished runs, and best.yaml once all runs are finished. Returns the table."""
    results = {
        trial.name: TrialResult(trial.name, {name: value_text(value) for name, value in trial.values.items()})
        for trial in sweep.trials
    }
    for trial, run in sweep.runs():
        if has_results(run):
            results[trial.name].runs.append(read_run(run.directory, seed=run.seed))
    trials, num_seeds = list(results.values()), len(sweep.seeds)
    text = write_sweep_report(trials, num_seeds=num_seeds, out=sweep.directory)
    file = sweep.directory / "best.yaml"
    file.unlink(missing_ok=True)  # that of an earlier grid
    best = best_trial(trials, num_seeds=num_seeds)
    if best is None:
        return text
    settings = sweep.settings_of(next(trial for trial in sweep.trials if trial.name == best.name))
    seeds = ", ".join(map(str, sweep.seeds))
    comment = f"# {best.name}: the best of {len(trials)} trials by mean validation accuracy (seeds {seeds})."
    write_whole(file, lambda path: path.write_text(f"{comment}\n{dump_yaml(settings)}", encoding="utf-8"))
    return f"{text} ({file})"
