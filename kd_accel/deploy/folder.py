"""Folder of a trained network for the Hugging Face Hub: README.md, config.json, model.json and model.safetensors.

A network of timm is loaded by `timm.create_model("local-dir:DIR", pretrained=True)`, any network by `kd_accel.load_model(DIR)`.
The folder is written under a temporary name, loaded from there and compared with the network, then its files are moved.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from kd_accel.deploy.export import refuse_difference
from kd_accel.deploy.parity import Parity, measure_parity
from kd_accel.deploy.samples import ParitySamples
from kd_accel.errors import UserError
from kd_accel.io.files import flush, write_json
from kd_accel.models.card import ModelCard
from kd_accel.models.preprocess import Normalize
from kd_accel.models.timm_folder import is_timm, load_timm_folder, timm_config
from kd_accel.models.weights import load_run_model, save_model

_TEMPORARY = ".tmp-"


def write_folder(network: nn.Module, card: ModelCard, out: Path, *, readme: str, samples: ParitySamples) -> Parity:
    """Write the folder, and keep it only if the network that is loaded from it computes the same logits.

    Files of other names in the directory, such as those of git, are kept.

    Args:
        network: Plain network in evaluation mode, on the CPU.
        card: Card of the network.
        out: The directory to create, or whose files to replace.
        readme: Content of README.md.
        samples: Images for the comparison.

    Returns:
        The comparison, which holds.

    Raises:
        UserError: If the folder cannot be loaded or written, or the logits differ. Previous files are then kept.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; give the path of a directory")
    try:
        with _temporary(out) as temporary:
            save_model(temporary, network, card=card)
            write_json(timm_config(network, card) if is_timm(card) else _config(card), temporary / "config.json")
            (temporary / "README.md").write_text(readme, encoding="utf-8")
            loaded = load_timm_folder(temporary) if is_timm(card) else load_run_model(temporary, field="export")[0]
            parity = measure_parity(network, loaded, Normalize(card.mean, card.std)(samples.images))
            refuse_difference(parity, samples, where=str(out))
            out.mkdir(exist_ok=True)
            for path in sorted(temporary.iterdir()):
                path.replace(out / path.name)
            flush(out)
    except OSError as error:
        raise UserError(
            f"--out: cannot write {out} ({error.strerror or error}); free disk space, check the permissions, or use another "
            "directory"
        ) from None
    return parity


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """Create an empty directory next to `out`, and remove it at the end."""
    temporary = out.absolute().with_name(f".{out.absolute().name}{_TEMPORARY}{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config(card: ModelCard) -> dict[str, Any]:
    """Return a config.json for the Hub, which counts its downloads, with the content of model.json."""
    return {"library_name": "kd_accel", "architecture": card.arch, "num_classes": len(card.label_names), **asdict(card)}
