"""Model card of a finished run for the Hugging Face Hub, from its config, its summary and the models of its teachers."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from kd_accel.config.paths import is_path_of_weights
from kd_accel.config.schema import DistillConfig, RunConfig
from kd_accel.deploy.model_card import readme_text
from kd_accel.errors import UserError
from kd_accel.io.files import read_json
from kd_accel.models.card import ModelCard, load_card


def run_readme(run: Path, config: RunConfig | None, network: nn.Module, card: ModelCard) -> str:
    """Return the README.md of a run.

    Args:
        run: Run directory; without summary.json the page has no accuracies.
        config: Config of the run; None = not known.
        network: The network.
        card: Its card.

    Raises:
        UserError: If summary.json is damaged.
    """
    has_summary = (run / "summary.json").is_file()
    summary = read_json(run / "summary.json", remedy="train the run again, or remove the file") if has_summary else {}
    if config and config.has_teacher:
        config = config.model_copy(update={"distill": config.distill or DistillConfig()})
    return readme_text(
        card,
        name=config.name if config and config.name else run.absolute().name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        settings=config.model_dump(mode="json") if config else {},
        summary=summary,
        teachers=_teachers(config) if config else {},
    )


def _teachers(config: RunConfig) -> dict[str, str]:
    """Return the architecture of each teacher by name, with the name of its weights unless they are a file."""
    own = {"teacher": config.teacher} if config.teacher else {}
    found = {}
    for name, teacher in {**own, **config.teachers}.items():
        weights = teacher.weights if teacher.weights and not is_path_of_weights(teacher.weights) else None
        found[name] = teacher.arch or _arch_of_run(teacher.run) or "a network whose outputs were stored"
        found[name] += f" ({weights})" if weights else ""
    return found


def _arch_of_run(run: str | None) -> str | None:
    try:
        return load_card(Path(run)).arch if run else None
    except UserError:  # moved or removed since the training
        return None
