"""`kd-accel export`: the network of a finished run as a file to deploy, or as a folder for the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from kd_accel.builders.model_card import run_readme
from kd_accel.config.evaluation import build_evaluation
from kd_accel.config.schema import RunConfig
from kd_accel.deploy.export import export_file
from kd_accel.deploy.folder import write_folder
from kd_accel.deploy.parity import BATCH_SIZES
from kd_accel.deploy.samples import parity_samples
from kd_accel.errors import UserError
from kd_accel.models.weights import load_run_model

_NAMES = {"onnx": "model.onnx", "torch": "model.pt2", "hub": "hub"}


def run_export(run: Path, *, file_format: Literal["onnx", "torch", "hub"], normalizes: bool, out: Path | None) -> None:
    """Export the network of a run, compare the export with the network, and print the comparison.

    Args:
        run: Run directory.
        file_format: `onnx`, `torch`, or `hub` for a folder.
        normalizes: Whether the file takes uint8 images and normalizes them.
        out: File, or directory of the folder; None = in the directory `export` of the run.

    Raises:
        UserError: If the run cannot be loaded or exported, or the logits of the export differ.
    """
    if normalizes and file_format == "hub":
        raise UserError("--normalize: has no effect on --format hub, whose config.json has mean and std; leave it out")
    network, card = load_run_model(run, field="export")
    config, problem = _config(run)
    samples = parity_samples(card, config.data if config else None, problem)
    out = out or run / "export" / _NAMES[file_format]
    if file_format == "hub":
        parity = write_folder(network, card, out, readme=run_readme(run, config, network, card), samples=samples)
    else:
        parity = export_file(network, card, out, file_format=file_format, normalizes=normalizes, samples=samples)
    sizes = " and ".join(map(str, BATCH_SIZES))
    print(f"Written to {out}; compared with the network on {samples.origin}, in batches of {sizes}: {parity}")


def _config(run: Path) -> tuple[RunConfig | None, str]:
    """Return the config of a run, or the reason why it cannot be read: a copied folder may lack it."""
    try:
        return build_evaluation(run, {}, losses={}), ""
    except UserError as error:
        return None, str(error)
