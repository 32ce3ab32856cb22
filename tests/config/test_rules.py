"""Rules of a config: the message of each has field, value, rule and remedy."""

import pytest

from kd_accel.config.schema import BenchConfig, ReproduceConfig
from tests.support.parsing import mistakes, parse


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data.source", "floppy"], "data.source: 'floppy' must be"),
        (["--data.val_fraction", "1"], "data.val_fraction"),
        (["--data.views", "0"], "data.views: 0 must be at least 1"),
        (["--data.mean", "[0.5,0.5,0.5]"], "data.mean and data.std: one of them is set; set both or none"),
        (["--data.mean", "[0.5]", "--data.std", "[1,1,1]"], "three numbers"),
        (["--data.mean", "[0,0,0]", "--data.std", "[0,1,1]"], "must be above 0"),
        (["--data.augment", "flip"], "data.augment"),
        (["--model.arch", "resnet18"], "model.arch: 'resnet18' must start with"),
        (["--name", "a/b"], "name: 'a/b' must be a single directory name"),
        (["--distill.alpha", "0.5"], "distill: has no effect without a teacher"),
        (["--teacher.run", "x", "--teacher.arch", "torchvision/resnet50"], "set either teacher.run"),
        (["--teacher.run", "x", "--teacher.stem", "cifar"], "teacher.stem: has no effect"),
        (["--teacher.arch", "torchvision/resnet50"], "teacher.weights: null, but a teacher must be trained"),
        (["--teacher.run", "x", "--role", "teacher"], "role: teacher has no effect"),
        (["--teacher.run", "x", "--distill.alpha", "1.5"], "distill.alpha: 1.5 must be at most 1"),
        (["--teacher.run", "x", "--distill.temperature", "0"], "distill.temperature: 0.0 must be above 0"),
        (["--teacher.run", "x", "--distill.alpha.start", "0.5"], "distill.alpha.floor: missing"),
        (
            ["--teacher.run", "x", "--distill.alpha", '{"kind": "linear", "start": 1, "end": 0, "decay": 0.5}'],
            "distill.alpha.decay: has no effect with kind linear",
        ),
        (
            ["--teacher.run", "x", "--distill.alpha", '{"kind": "constant", "start": 1, "unit": "step"}'],
            "distill.alpha.unit: has no effect with kind constant",
        ),
        (
            ["--teacher.run", "x", "--distill.features.mse.weight", "0"],
            "distill.features.mse.weight: 0, so that the term has no effect; remove it with distill.features.mse: null",
        ),
        (["--teacher.run", "x", "--distill.features.mse.weight", "-1"], "distill.features.mse.weight: -1.0 must be at least 0"),
        (
            ["--teacher.run", "x", "--distill.features.mse.layers", "[a, a]"],
            "['a', 'a'] must name at least one module, each once",
        ),
        (["--teacher.run", "x", "--distill.features.mse.layers", "{}"], "distill.features.mse.layers: [] must name"),
        (["--teacher.run", "x", "--distill.label_weight", "-1"], "distill.label_weight: -1.0 must be at least 0"),
        (["--teacher.run", "x", "--distill.logits", "null"], "distill.label_weight: null means 1 - alpha"),
        (["--teacher.run", "x", "--distill.logits", "null"], "distill: logits is null and features is empty"),
        (
            ["--teacher.run", "x", "--distill.logits=null", "--distill.alpha=0.3"],
            "distill.alpha: has no effect (with distill.logits null)",
        ),
        (
            ["--teacher.run", "x", "--distill.logits.loss", "kll"],
            "distill.logits.loss: 'kll' is not the name of a loss between logits; did you mean kl?",
        ),
        (
            ["--teacher.run", "x", "--distill.features.msee", "{}"],
            "distill.features.msee: 'msee' is not the name of a loss between features; did you mean mse?",
        ),
        (
            ["--teacher.run", "x", "--distill.features.mse.loss", "kl"],
            "distill.features.mse.loss: 'kl' is not the name of a loss between features (known: mse, import:",
        ),
        (["--optim.lr", "0"], "optim.lr: 0.0 must be above 0"),
        (["--optim.name", "adamw", "--optim.nesterov", "true"], "optim.nesterov: has no effect (with optimizer adamw)"),
        (["--optim.betas", "[0.9, 0.99]"], "optim.betas: has no effect (with optimizer sgd)"),
        (["--optim.step_epochs", "[3]"], "optim.step_epochs: has no effect (with onecycle)"),
        (["--optim.schedule", "step", "--optim.step_epochs", "[3, 10]"], "must be above 0 and below train.epochs (10)"),
        (["--optim.momentum", "1"], "optim.momentum: 1.0 must be below 1"),
        (["--seed", "-1"], "seed: -1 must be at least 0"),
        (["--data.image_column", "img"], "data.image_column: has no effect (with source digits)"),
        (["--data.test_split", "val"], "data.test_split: has no effect (with source digits)"),
        (["--data.source", "imagefolder:x", "--data.label_column", "y"], "data.label_column: has no effect (with this source)"),
        (["--data.augment", "none", "--data.view_seed", "1"], "data.view_seed: has no effect (with augment none)"),
        (["--data.augment", "none", "--data.views", "3"], "data.views: has no effect (with augment none"),
        (["--data.augment", "resized_crop", "--data.crop_padding", "2"], "data.crop_padding: has no effect"),
        (["--data.val_fraction", "0", "--train.eval_every_epochs", "2"], "train.eval_every_epochs: has no effect"),
        (["--teacher.run", "x", "--teacher.outputs", "cached"], "teacher.cache.dir: missing"),
        (
            ["--teacher.run", "x", "--teacher.outputs", "cached", "--teacher.cache.dir", "c"],
            "data.views: null means new views in each epoch",
        ),
        (["--teacher.run", "x", "--teacher.outputs", "mixed"], "without distill.features use cached"),
        (
            ["--teacher.run", "x", "--teacher.cache.dtype", "int8"],
            "teacher.cache.dtype: has no effect (with teacher.outputs live)",
        ),
        (["--teacher.run", "x", "--teacher.cache.shard_mib", "1"], "teacher.cache.shard_mib: has no effect"),
        (["--teacher.run", "x", "--teacher.cache.shard_mib", "0"], "teacher.cache.shard_mib: 0.0 must be above 0"),
        (["--teacher.run", "x", "--teacher.cache.batch_size", "0"], "teacher.cache.batch_size: 0 must be at least 1"),
        (["--optim.schedule", "step"], "optim.step_epochs: empty"),
        (["--optim.warmup_fraction", "1"], "optim.warmup_fraction"),
        (["--optim.clip_norm", "0"], "optim.clip_norm"),
        (["--train.batch_size", "10", "--train.grad_accum_steps", "4"], "10 must be a multiple of train.grad_accum_steps (4)"),
        (["--train.ema_decay", "1"], "train.ema_decay"),
        (["--train.precision", "fp8"], "train.precision"),
        (["--checkpoint.keep", "0"], "checkpoint.keep: 0 must be at least 1"),
        (["--checkpoint.resume", "maybe"], "checkpoint.resume"),
        (["--tracking.timeout_s", "0"], "tracking.timeout_s"),
    ],
)
def test_each_rule_names_field_value_and_rule(flags, part):
    assert part in mistakes(*flags)


def test_alpha_above_one_needs_a_label_weight():
    flags = ["--teacher.run=x", "--distill.alpha=5", "--distill.label_weight=1"]
    assert parse(*flags).distill.alpha == 5.0
    assert mistakes(*flags[:2]) == "distill.alpha: 5.0 must be at most 1 (on the command line)"


def test_distillation_of_features_alone_is_valid():
    distill = parse("--teacher.run=x", "--distill.logits=null", "--distill.label_weight=1", "--distill.features.mse={}").distill
    assert distill.logits is None and distill.label_weight == 1.0


def test_message_of_a_rule_names_the_file(config_file):
    path = config_file("optim: {lr: 0}\ntrain: {epochs: 0}")
    assert mistakes("--config", path) == (
        f"2 mistakes:\n  optim.lr: 0.0 must be above 0 (in {path})\n  train.epochs: 0 must be at least 1 (in {path})"
    )


@pytest.mark.parametrize(
    ("kind", "prefix", "flags"),
    [
        (BenchConfig, "", []),
        (ReproduceConfig, "bench.", ["--runs=[a.yaml]", "--launch=x", "--report_dir=y"]),
    ],
)
def test_rules_of_a_measurement(kind, prefix, flags):
    flags = [
        *flags,
        f"--{prefix}batch_sizes=[1, 0]",
        f"--{prefix}threads=0",
        f"--{prefix}cuda_graph=true",
        f"--{prefix}device=cpu",
    ]
    message = mistakes(*flags, config_class=kind)
    assert f"{prefix}threads: 0 must be at least 1" in message
    assert f"{prefix}batch_sizes: [1, 0] must list at least one number, each at least 1" in message
    assert f"{prefix}cuda_graph: has no effect with device cpu; leave it out" in message
