"""Model card of a trained network for the Hugging Face Hub: YAML metadata, and a page in Markdown.

In: the model card of the run, its settings and its summary. Out: the text of README.md. It names no directory of this machine:
of a local data set it has the kind and the last part of the path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kd_accel.models.card import ModelCard
from kd_accel.models.timm_folder import is_timm

_LOCAL_KINDS = ("parquet", "imagefolder", "csv", "disk")
_OBJECTIVE = ("temperature", "alpha", "label_weight", "logits", "features", "ensemble")


def readme_text(
    card: ModelCard,
    *,
    name: str,
    parameters: int,
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    teachers: Mapping[str, str],
) -> str:
    """Return the content of README.md.

    Args:
        card: Card of the network.
        name: Name of the model.
        parameters: Number of parameters.
        settings: Settings of the run as nested JSON values; empty = not known.
        summary: Content of the run's summary.json; empty = not known.
        teachers: Architecture of each teacher by name.
    """
    source = shown_source(settings["data"]["source"]) if settings else None
    front = yaml.safe_dump(_front_matter(card, name, source, summary), sort_keys=False, allow_unicode=True)
    body = [
        f"# {name}",
        _introduction(card, teachers),
        _table(_figures(card, parameters, summary)),
        f"## Use\n\n{_use(card)}",
        f"## Data\n\n{_data(card, source, summary)}",
        *_training(settings, teachers),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(body) + "\n"


def shown_source(source: str) -> str:
    """Return a data source without the directories of this machine."""
    kind, colon, location = source.partition(":")
    is_local = kind in _LOCAL_KINDS or (kind == "hub" and location.startswith(("/", ".", "~")))
    return f"{kind}{colon}{Path(location).name}" if is_local else source


def _front_matter(card: ModelCard, name: str, source: str | None, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata in the form of the Hub, in which an accuracy is a result on a data set."""
    kind, _, repository = (source or "").partition(":")
    hub_data = repository.partition("@")[0] if kind == "hub" and "/" in repository else None
    content: dict[str, Any] = {
        "library_name": "timm" if is_timm(card) else "kd_accel",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "kd-accel", *(["timm"] if is_timm(card) else [])],
    }
    if hub_data:
        content["datasets"] = [hub_data]
    if (accuracy := _number(summary, "accuracy")) is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": hub_data or kind or "unknown", "name": hub_data or source or "unknown", "split": "test"},
            "metrics": [{"type": "accuracy", "value": round(accuracy, 4)}],
        }
        content |= {"metrics": ["accuracy"], "model-index": [{"name": name, "results": [result]}]}
    return content


def _introduction(card: ModelCard, teachers: Mapping[str, str]) -> str:
    taught = f", distilled from {' and '.join(teachers.values())}" if teachers else ""
    return f"{card.arch} for images of {len(card.label_names)} classes{taught}. Trained with kd_accel."


def _figures(card: ModelCard, parameters: int, summary: Mapping[str, Any]) -> dict[str, str]:
    rates = {
        "accuracy on the test samples": "accuracy",
        "accuracy of the teacher": "teacher_accuracy",
        "agreement with the teacher": "agreement",
    }
    found = {title: _number(summary, key) for title, key in rates.items()}
    return {
        **{title: f"{100 * rate:.2f} %" for title, rate in found.items() if rate is not None},
        "parameters": f"{parameters:,}",
        "input": f"RGB, {card.image_size}x{card.image_size} pixels",
        "classes": f"{len(card.label_names)}",
    }


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| figure | value |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows.items())])


_USE = """In a folder `DIR` with the files of this repository, with kd_accel installed:

```python
import kd_accel as kd

model = kd.load_model("DIR")
predictions = model.predict(["photo.jpg"])  # label, score, probabilities
```
{remark}"""

_USE_TIMM = """
With timm alone, 1.0.16 or later (`hf-hub:USER/NAME` in place of `local-dir:DIR` after an upload):

```python
import timm

model = timm.create_model("local-dir:DIR", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

timm resizes before it crops, so its pixels are close to those of the training, not equal.
"""


def _use(card: ModelCard) -> str:
    if is_timm(card):
        return _USE.format(remark=_USE_TIMM).rstrip()
    is_own = card.arch.startswith("import:")
    return _USE.format(remark=f"\n`{card.arch}` builds the network, and must be importable." if is_own else "").rstrip()


def _data(card: ModelCard, source: str | None, summary: Mapping[str, Any]) -> str:
    stored = _section(summary, "data")
    of_test = _section(stored, "test").get("samples")
    counts = {"train": stored.get("train_samples"), "validation": stored.get("val_samples"), "test": of_test}
    rows = {f"{split} samples": f"{count:,}" for split, count in counts.items() if isinstance(count, int)}
    preprocessing = (
        f"Images are turned upright, cropped to the central square of {100 * card.crop_pct:g} % of the shorter side, resized "
        f"to {card.image_size} pixels ({card.interpolation}) and normalized with mean {_short(card.mean)} and standard "
        f"deviation {_short(card.std)}. `model.json` has these values in full."
    )
    return f"{_table({'source': source or 'not known', **rows})}\n\n{preprocessing}"


def _training(settings: Mapping[str, Any], teachers: Mapping[str, str]) -> list[str]:
    """Return the section on the training, with the settings as YAML; nothing without settings."""
    if not settings:
        return []
    train, shown = settings["train"], dict[str, Any]()
    if teachers and (distill := settings.get("distill")):
        weights = {name: own["weight"] for name, own in settings.get("teachers", {}).items()}
        shown |= {"teachers": {name: {"weight": weight} for name, weight in weights.items()}} if weights else {}
        shown["distill"] = _objective(distill, has_several_teachers=bool(weights))
    shown["train"] = {name: train[name] for name in ("epochs", "max_steps", "batch_size", "precision") if train.get(name)}
    shown["optim"] = {name: value for name, value in settings["optim"].items() if value is not None}
    taught = "".join(f"Teacher{'' if name == 'teacher' else f' `{name}`'}: {arch}. " for name, arch in teachers.items())
    text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, default_flow_style=None)
    return [f"## Training\n\n{taught}Settings:\n\n```yaml\n{text}```"]


def _objective(distill: Mapping[str, Any], *, has_several_teachers: bool) -> dict[str, Any]:
    """Return the settings of the objective, without those that have no effect."""
    found = {name: distill[name] for name in _OBJECTIVE if name in distill}
    if found.get("logits") is None:
        found = {name: value for name, value in found.items() if name not in ("temperature", "alpha", "ensemble")}
    if not has_several_teachers:
        found.pop("ensemble", None)
    return {name: value for name, value in found.items() if name == "logits" or value not in (None, {})}


def _section(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def _number(summary: Mapping[str, Any], key: str) -> float | None:
    value = summary.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _short(values: list[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
