"""Directories of runs and bench files as a report reads them, written by hand."""

import json

import numpy as np
import yaml

from kd_accel.training.prediction_file import save_predictions, with_errors
from kd_accel.training.predictions import Predictions

RESNET50, RESNET18 = "torchvision/resnet50", "torchvision/resnet18"


def finished_run(root, directory_name, /, **changes):
    """Create the directory of a finished run, without the weights."""
    directory = root / directory_name
    directory.mkdir()
    summary = {
        "name": directory_name,
        "role": "student",
        "arch": RESNET18,
        "accuracy": 0.7506,
        "parameters": 11_181_642,
        "is_scheduled": False,
        "data": {"label_names": ["a", "b"]},
    }
    (directory / "summary.json").write_text(json.dumps({**summary, **changes}))
    lines = [{"step": step, "epoch": 0, "split": "train", "loss": 2.0 / step, "ce": 1.0 / step} for step in range(1, 5)]
    lines += [{"step": 4, "epoch": epoch, "split": "val", "loss": 1.0, "accuracy": 0.2 * epoch} for epoch in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def bench_file(root, *runs):
    """Create a bench file of runs, each (directory, median in milliseconds)."""
    models = [
        {
            "name": str(directory),
            "macs": 37_017_600,
            "latency": [{"batch_size": 32, "median_ms": 99.0}, {"batch_size": 1, "median_ms": median_ms}],
        }
        for directory, median_ms in runs
    ]
    path = root / "bench.json"
    path.write_text(json.dumps({"device": "cpu", "models": models}))
    return path


def settings(name, **changes):
    """Return the config of a run, nested."""
    config = {"name": name, "run_dir": f"/somewhere/{name}", "seed": 0, "role": "student", "data": {"source": "digits"}}
    return {
        **config,
        "model": {"arch": RESNET18},
        "teacher": None,
        "train": {"epochs": 3, "max_steps": None},
        "tracking": {"wandb": "disabled"},
        **changes,
    }


def write_settings(directory, **changes):
    (directory / "config.yaml").write_text(yaml.safe_dump(settings(directory.name, **changes), sort_keys=False))


def unfinished_run(root, name, **changes):
    """Create the directory of a run that was stopped after four steps, its last line of metrics cut off."""
    directory = finished_run(root, name)
    (directory / "summary.json").unlink()
    write_settings(directory, **changes)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')
    return directory


def write_predictions(directory, *, labels, predicted, ranks=None, teacher=None):
    """Write predictions.safetensors; the images of errors are of one gray, 2 pixels high and 3 wide."""
    labels, predicted = np.asarray(labels, np.int64), np.asarray(predicted, np.int64)
    ranks = np.where(labels == predicted, 0, 1) if ranks is None else np.asarray(ranks)
    teacher = None if teacher is None else np.asarray(teacher, np.int64)
    scores = np.linspace(0.5, 0.9, len(labels), dtype=np.float32)
    index = np.arange(len(labels)) + 100
    predictions = Predictions(index, labels, predicted, scores, ranks.astype(np.int64), teacher, None)

    def pixels(index):
        return np.tile(index.astype(np.uint8)[:, None, None, None], (1, 2, 3, 3))

    stored = with_errors(predictions, pixels)
    save_predictions(directory, stored)
    return stored
