"""Suggestions for unknown settings: usual names of other programs, hyphens, other sections, parts of names, misspellings."""

import pytest

from kd_accel.config.fields import NAME, exists, leaves
from kd_accel.config.schema import BenchConfig, RunConfig
from kd_accel.config.suggestions import _ALIASES, meant, suggestions
from tests.support.parsing import mistakes


def first_line(*argv, **kind):
    """Return the message for the first mistake."""
    lines = mistakes(*argv, **kind).splitlines()
    return lines[0] if len(lines) == 1 else lines[1].strip()


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("--lr=0.1", "--optim.lr"),
        ("--LR=0.1", "--optim.lr"),
        ("--train.lr=0.1", "--optim.lr"),
        ("--learning_rate=0.1", "--optim.lr"),
        ("--learning-rate=0.1", "--optim.lr"),
        ("--epochs=3", "--train.epochs"),
        ("--num_train_epochs=3", "--train.epochs"),
        ("--batch-size=8", "--train.batch_size or --teacher.cache.batch_size"),
        ("--batch_size=8", "--train.batch_size or --teacher.cache.batch_size"),
        ("--train.batch-size=8", "--train.batch_size"),
        ("--train-batch-size=8", "--train.batch_size"),
        ("--batch=8", "--train.batch_size, --train.eval_batch_size or --teacher.cache.batch_size"),
        ("--per_device_train_batch_size=8", "--train.batch_size"),
        ("--workers=2", "--data.num_workers"),
        ("--data.workers=2", "--data.num_workers"),
        ("--wd=1e-4", "--optim.weight_decay"),
        ("--weight-decay=1e-4", "--optim.weight_decay"),
        ("--momentum=0.8", "--optim.momentum"),
        ("--opt=adamw", "--optim.name"),
        ("--arch=timm/x", "--model.arch or --teacher.arch"),
        ("--model.name=timm/x", "--model.arch"),
        ("--output-dir=x", "--run_dir"),
        ("--output_dir=x", "--run_dir"),
        ("--out=x", "--run_dir"),
        ("--temperature=2", "--distill.temperature"),
        ("--temp=2", "--distill.temperature"),
        ("--alpha=0.3", "--distill.alpha"),
        ("--mixup=0.2", "--data.transform.mixup.alpha"),
        ("--cutmix_alpha=1.0", "--data.transform.cutmix.alpha"),
        ("--amp", "--train.precision"),
        ("--fp16", "--train.precision=fp16"),
        ("--bf16=true", "--train.precision=bf16"),
        ("--no-wandb", "--tracking.wandb=disabled"),
        ("--resume=must", "--checkpoint.resume"),
        ("--project=x", "--tracking.project"),
        ("--data.path=x", "--data.source"),
        ("--dataset=x", "--data.source"),
        ("--cache_dir=x", "--teacher.cache.dir"),
        ("--teacher.cache_dir=x", "--teacher.cache.dir"),
        ("--teacher.dtype=int8", "--teacher.cache.dtype"),
        ("--clip=1", "--optim.clip_norm"),
        ("--kd_alpha=1", "--distill.alpha"),
        ("--checkpoint.epochs=2", "--checkpoint.every_epochs or --train.epochs"),
        ("--temprature=2", "--distill.temperature"),
        ("--trian.batch_sise=2", "--train.batch_size"),
        ("--distil.alpha=0.1", "--distill.alpha"),
        ("--teacher.cash.dtype=int8", "--teacher.cache.dtype"),
        ("--distill.featurs.mse.wieght=1", "--distill.features.mse.weight"),
    ],
)
def test_unknown_flag_suggests_the_flag_to_type(typed, shown):
    name = typed.partition("=")[0]
    assert first_line(typed) == f"{name}: no such setting; did you mean {shown}?"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("--teacher=runs/x", "--teacher.run"),
        ("--model=timm/x", "--model.arch"),
        ("--data=digits", "--data.source"),
        ("--optim=adamw", "--optim.name"),
        ("--tracking=offline", "--tracking.wandb"),
    ],
)
def test_text_for_a_section_suggests_its_main_setting(typed, shown):
    assert f"; did you mean {shown}? (on the command line)" in mistakes(typed)


def test_flag_without_a_value_has_an_example():
    assert mistakes("--train.compile") == "--train.compile: a value is missing; write --train.compile true or false"
    assert mistakes("--teacher") == "--teacher: a value is missing; write --teacher.run VALUE"


@pytest.mark.parametrize(
    "typed", ["--device=cuda", "--verbose", "--dropout=0.1", "--gpus=2", "--=1", "--.=1", "--" + "x" * 3000]
)
def test_unknown_flag_without_a_similar_setting_refers_to_the_help(typed):
    assert mistakes(typed).endswith(": no such setting; --help lists all settings")


@pytest.mark.parametrize(
    ("text", "name", "shown"),
    [
        ("lr: 0.1", "lr", "optim: {lr: ...}"),
        ("optim.lr: 0.1", "optim.lr", "optim: {lr: ...}"),
        ("fp16: true", "fp16", "train: {precision: fp16}"),
        ("batch-size: 8", "batch-size", "train: {batch_size: ...} or teacher: {cache: {batch_size: ...}}"),
        ("optim: {weight-decay: 1}", "optim.weight-decay", "optim.weight_decay"),
        ("optim: {wd: 1}", "optim.wd", "optim.weight_decay"),
        ("train: {lr: 1}", "train.lr", "optim: {lr: ...}"),
        ("train: {epoch: 1}", "train.epoch", "train.epochs"),
        ("cache: {dir: x}", "cache", "teacher: {cache: ...}"),
        ("teechr: {run: x}", "teechr", "teacher"),
    ],
)
def test_unknown_key_of_a_file_suggests_the_key_to_write(config_file, text, name, shown):
    path = config_file(text)
    assert first_line(path) == f"{name}: no such setting; did you mean {shown}? (in {path})"


def test_file_in_the_form_of_another_program_has_a_suggestion_for_each_key(config_file):
    text = mistakes(config_file("lr: 0.1\nepochs: 3\nbatch_size: 8\nworkers: 4\n"))
    assert text.startswith("4 mistakes:") and text.count("did you mean") == 4


def test_flag_of_another_command_suggests_its_own_settings():
    assert (
        first_line("--batch-size=8", config_class=BenchConfig) == "--batch-size: no such setting; did you mean --batch_sizes?"
    )
    assert "--help lists" in first_line("--lr=8", config_class=BenchConfig)


def test_aliases_lead_to_settings_and_are_not_settings_themselves():
    names = [keys for keys, _ in leaves(RunConfig) if NAME not in keys]
    known = {keys[-1] for keys in names} | {"_".join(keys) for keys in names}
    assert set(_ALIASES) & known == set()
    for targets in _ALIASES.values():
        assert all(exists(RunConfig, tuple(target.partition("=")[0].split("."))) for target in targets.split())


def test_each_setting_is_found_by_its_last_name_and_with_hyphens():
    for keys, _ in leaves(RunConfig):
        if NAME not in keys and len(keys) > 1:
            for typed in ((keys[-1],), (keys[-1].replace("_", "-"),), ("-".join(keys),)):
                found = [each.keys for each in suggestions(RunConfig, typed, 1)]
                assert keys in found or exists(RunConfig, typed), typed


def test_only_an_unambiguous_misspelling_is_validated_as_the_setting():
    assert meant(RunConfig, ("lr",), 1) == ("optim", "lr")
    assert meant(RunConfig, ("batch_size",), 1) is None, "more than one setting"
    assert meant(RunConfig, ("warmup_epochs",), 5) is None, "a usual name may have another unit"
    assert first_line("--warmup_epochs=5") == "--warmup_epochs: no such setting; did you mean --optim.warmup_fraction?"
    assert mistakes("--epochs=x").splitlines()[2] == "  train.epochs: must be an integer, not 'x' (on the command line)"
