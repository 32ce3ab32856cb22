"""Suggestions for an unknown setting: names that other training programs use, and the nearest names of the schema."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from kd_accel.config.fields import NAME, Keys, child, entry_of, exists, is_text, leaves, match, section_of, takes_scalar

_USUAL_NAMES = {
    "name": "run_name experiment experiment_name exp_name wandb_name wandb_run_name",
    "run_dir": "out out_dir output output_dir output_folder save_dir save_path model_dir log_dir logdir logging_dir work_dir",
    "seed": "random_seed manual_seed data_seed",
    "data.source": "dataset dataset_name dataset_dir dataset_path data_dir data_path data_root data_set train_dir",
    "data.image_size": "img_size imgsz input_size resolution crop_size",
    "data.transform": "aa aug augment auto_augment augmentation augmentations transforms",
    "data.transform.random_crop.padding": "crop_padding",
    "data.transform.mixup.alpha": "mixup mixup_alpha",
    "data.transform.mixup.p": "mixup_prob",
    "data.transform.cutmix.alpha": "cutmix cutmix_alpha",
    "data.transform.cutmix.p": "cutmix_prob",
    "data.val_fraction": "val_ratio validation_ratio",
    "data.val_split": "validation_split valid_split",
    "data.test_fraction": "test_ratio test_size",
    "data.limit_train": "max_train_samples limit_train_batches train_samples",
    "data.limit_test": "max_eval_samples max_test_samples limit_test_batches",
    "data.num_workers": "j nworkers",
    "data.sampling": "sampler weighted_sampler balanced_sampling weighted_sampling",
    "model.arch": "a architecture backbone net network model_name model_name_or_path student student_model student_arch",
    "model.weights": "pretrained checkpoint_path initial_checkpoint init_from finetune",
    "model.freeze": "freeze_backbone freeze_encoder frozen_layers freeze_layers freeze_modules",
    "teacher.run teacher.arch": "teacher_model teacher_name teacher_path teacher_checkpoint teacher_model_name_or_path",
    "teacher.cache.dir": "cache_path cache_folder",
    "distill.temperature": "t temp tau kd_t distillation_temperature",
    "distill.alpha": "kd_weight lambda_kd distillation_alpha",
    "distill.label_weight": "ce_weight lambda_ce",
    "distill.logits.loss": "kd_loss distill_loss distillation_type criterion",
    "optim.name": "opt optimizer optimizer_name optim_type",
    "optim.lr": "learning_rate",
    "optim.betas": "opt_betas adam_beta1 adam_beta2",
    "optim.weight_decay": "wd",
    "optim.norm_bias_weight_decay": "norm_weight_decay bias_weight_decay no_bias_decay filter_bias_and_bn",
    "optim.schedule": "sched scheduler lr_scheduler lr_scheduler_type lr_schedule lr_policy",
    "optim.warmup_fraction": "warmup_epochs warmup_steps warmup_ratio lr_warmup_epochs",
    "optim.step_epochs": "milestones decay_epochs decay_milestones lr_step_size lr_steps",
    "optim.step_gamma": "decay_rate lr_decay lr_gamma",
    "optim.clip_norm": "clip_grad grad_clip max_grad_norm max_norm gradient_clip_val gradient_clipping",
    "train.epochs": "n_epochs num_epochs max_epochs num_train_epochs",
    "train.max_steps": "steps num_steps max_iters max_train_steps num_train_steps",
    "train.batch_size": "b bs global_batch_size per_device_train_batch_size",
    "train.eval_batch_size": "validation_batch_size val_batch_size test_batch_size per_device_eval_batch_size",
    "train.grad_accum_steps": "accum_iter accumulate_grad_batches gradient_accumulation_steps",
    "train.precision": "amp amp_dtype mixed_precision half",
    "train.precision=bf16": "bf16",
    "train.precision=fp16": "fp16",
    "train.compile": "torchcompile torch_compile",
    "train.class_weights": "class_weight ce_class_weights weighted_loss",
    "train.early_stopping_epochs": "early_stopping early_stopping_patience patience",
    "train.eval_every_epochs": "eval_interval eval_freq eval_steps val_interval check_val_every_n_epoch",
    "train.log_every_steps": "log_interval log_every log_every_n_steps logging_steps print_freq",
    "train.sync_batchnorm": "sync_bn",
    "checkpoint.every_epochs": "save_every checkpoint_every checkpoint_interval save_interval save_freq",
    "checkpoint.every_steps": "save_steps",
    "checkpoint.keep": "checkpoint_hist save_total_limit keep_checkpoints",
    "checkpoint.keep_best": "save_best save_best_only load_best_model_at_end",
    "checkpoint.resume": "resume_from resume_from_checkpoint auto_resume",
    "tracking.wandb=disabled": "no_wandb",
    "tracking.wandb": "use_wandb log_wandb report_to logger",
    "tracking.project": "project_name",
}
"""Settings, with their names in timm's train.py, Hugging Face's TrainingArguments, Lightning's Trainer, PyTorch's ImageNet
example and distillation scripts, as far as spelling does not find them. A value after `=` is part of the suggestion."""

_ALIASES = {alias: targets for targets, aliases in _USUAL_NAMES.items() for alias in aliases.split()}
_TOO_GENERAL = {"name", "run", "dir", "args"}
"""Last names of settings that a longer unknown name may contain by chance, as `run_id` does."""

_MOST = 3
_CLOSE_SIBLING, _CLOSE_NAME, _CLOSE_PATH = 0.7, 0.75, 0.85


Form = Literal["", "--", "yaml"]
"""Form in which a setting is typed: by its dotted name, as a flag, or as nested YAML."""


class Suggestion(NamedTuple):
    """A setting that an unknown name may stand for.

    Attributes:
        keys: Parts of the setting's name.
        value: Value that the unknown name implies, as `fp16` does; empty = the user's own.
    """

    keys: Keys
    value: str = ""


def suggestions(config_class: type[BaseModel], keys: Keys, value: Any) -> list[Suggestion]:
    """Return the settings that an unknown name may stand for, at most three.

    Args:
        config_class: Schema of the settings.
        keys: Parts of the unknown name; a hyphen counts as an underscore.
        value: Its value; only a mapping can stand for a section.
    """
    usual = [each.partition("=") for each in _usual_names(keys)]
    found = [Suggestion(tuple(name.split(".")), given) for name, _, given in usual]
    known = [suggestion for suggestion in found if exists(config_class, suggestion.keys)]
    return known or [Suggestion(found) for found in _nearest(config_class, keys, value)[:_MOST]]


def meant(config_class: type[BaseModel], keys: Keys, value: Any) -> Keys | None:
    """Return the setting of which an unknown name is a misspelling; None for no setting, or more than one."""
    found = [] if _usual_names(keys) else _nearest(config_class, keys, value)
    return found[0] if len(found) == 1 else None


def listed(found: Sequence[Suggestion], form: Form) -> str:
    """Return '; did you mean A or B?', or the empty string for no suggestion."""
    if not found:
        return ""
    shown = [_nested(each) if form == "yaml" else _dotted(each, form) for each in found]
    return f"; did you mean {', '.join(shown[:-1])}{' or ' if shown[1:] else ''}{shown[-1]}?"


def _dotted(suggestion: Suggestion, prefix: str) -> str:
    return f"{prefix}{'.'.join(suggestion.keys)}{'=' if suggestion.value else ''}{suggestion.value}"


def _nested(suggestion: Suggestion) -> str:
    *sections, name = suggestion.keys
    inner = f"{name}: {suggestion.value or '...'}"
    for section in reversed(sections):
        inner = f"{section}: {{{inner}}}"
    return inner


def main_setting(annotation: Any) -> str | None:
    """Return the setting for which a text in place of a section most likely stands: the first, if it takes text."""
    section = section_of(annotation)
    if section is None or takes_scalar(annotation):
        return None
    name, field = next(iter(section.model_fields.items()))
    return name if is_text(field.annotation) else None


def type_of(config_class: type[BaseModel], keys: Keys) -> Any:
    """Return the type of a setting, or of the setting that `meant` returns for an unknown name; None if it returns None."""
    found = keys if exists(config_class, keys) else meant(config_class, keys, None)
    annotation: Any = config_class
    for key in found or ():
        annotation = child(annotation, key)
    return annotation if found else None


def _usual_names(keys: Keys) -> list[str]:
    """Return the settings that the table has for a name, by all its parts or by the last one."""
    parts = [_normalized(key) for key in keys]
    return _ALIASES.get("_".join(parts), _ALIASES.get(parts[-1], "")).split()


def _normalized(key: str) -> str:
    return key.strip("-_").replace("-", "_").lower()


def _nearest(config_class: type[BaseModel], keys: Keys, value: Any) -> list[Keys]:
    """Return the settings with the nearest name, those of the same section first."""
    keys = _with_known_sections(config_class, tuple(".".join(keys).split(".")))
    if exists(config_class, keys):
        return [keys]
    siblings = [(*keys[:-1], key) for key in _siblings(config_class, keys, value)]
    known = _known(config_class, is_section=isinstance(value, dict))
    found = next((found for found in _candidates(keys, siblings, known) if found), [])
    return sorted(dict.fromkeys(found), key=lambda each: (each[:-1] != keys[:-1], len(each)))


def _candidates(keys: Keys, siblings: list[Keys], known: list[Keys]) -> Iterator[list[Keys]]:
    """Yield the settings found by each rule, the most reliable rule first.

    Args:
        keys: Parts of the unknown name.
        siblings: Settings of the same section.
        known: Settings of all sections.
    """
    name, path = keys[-1], "_".join(keys)
    in_section = [each for each in siblings if _has_words(each[-1], name)]
    yield [*in_section, *(each for each in known if _ends_with(each, path, name))]
    yield _close(name, siblings, cutoff=_CLOSE_SIBLING)
    yield [each for each in known if _has_words(each[-1], name)]
    yield [each for each in known if each[-1] not in _TOO_GENERAL and _has_words(name, each[-1])]
    yield _close(name, known, cutoff=_CLOSE_NAME)
    by_path = {"_".join(each): each for each in known}
    yield [by_path[found] for found in difflib.get_close_matches(path, by_path, n=1, cutoff=_CLOSE_PATH)]


def _with_known_sections(config_class: type[BaseModel], keys: Keys) -> Keys:
    """Return a name with each unknown part spelled as the schema has it, where only hyphens, case or a section differ."""
    parent: Any = config_class
    fixed: Keys = ()
    for key in keys:
        if child(parent, key) is None and section_of(parent) is not None:
            key = _normalized(key)
            sections = [name for name, field in _fields(parent) if section_of(field) or entry_of(field)]
            if child(parent, key) is None and len(fixed) < len(keys) - 1:
                key = match(key, sections) or key
        fixed, parent = (*fixed, key), child(parent, key)
    return fixed


def _fields(annotation: Any) -> list[tuple[str, Any]]:
    section = section_of(annotation)
    return [(name, field.annotation) for name, field in section.model_fields.items()] if section else []


def _siblings(config_class: type[BaseModel], keys: Keys, value: Any) -> list[str]:
    """Return the settings of the section of a name that can take the value."""
    parent: Any = config_class
    for key in keys[:-1]:
        parent = child(parent, key)
    is_scalar = {name: takes_scalar(field) or section_of(field) is None for name, field in _fields(parent)}
    return [name for name in is_scalar if is_scalar[name] or isinstance(value, dict)]


def _known(config_class: type[BaseModel], *, is_section: bool) -> list[Keys]:
    """Return the names of all settings, and of the sections if the value is one, that can be typed as they are."""
    found = [keys for keys, _ in leaves(config_class)]
    if is_section:
        found = [keys[:end] for keys in found for end in range(1, len(keys) + 1)]
    return [keys for keys in dict.fromkeys(found) if NAME not in keys]


def _ends_with(keys: Keys, path: str, name: str) -> bool:
    """Return whether a setting's name ends with an unknown name or its last part: `teacher_cache_dir`, `cache_dir`, `dir`."""
    return any("_".join(keys[start:]) in (path, name) for start in range(len(keys)))


def _has_words(name: str, other: str) -> bool:
    return bool(other) and set(other.split("_")) <= set(name.split("_"))


def _close(name: str, known: Sequence[Keys], *, cutoff: float) -> list[Keys]:
    """Return the settings with the last name that is most similar to `name`."""
    best = difflib.get_close_matches(name, {each[-1]: None for each in known}, n=1, cutoff=cutoff)
    return [each for each in known if each[-1] in best]
