"""Rules of a config: the message of each has field, value, rule and remedy."""

import pytest

from kd_accel.config.loss_weights import labels_without_weight, notices_of_weights
from kd_accel.config.schema import BenchConfig, ReproduceConfig, Schedule
from kd_accel.models.pretrained import WeightsInfo, weights_info
from tests.support.parsing import mistakes, parse


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data.source", "floppy"], "data.source: 'floppy' must be"),
        (["--data.val_fraction", "1"], "data.val_fraction"),
        (["--data.source=csv:x", "--data.test_fraction=1.0"], "data.test_fraction: 1.0 must be above 0 and below 1"),
        (["--data.source=csv:x", "--data.test_fraction=0.0"], "data.test_fraction: 0.0 must be above 0 and below 1"),
        (["--data.source=csv:x", "--data.val_split=train"], "data.val_split: 'train' must be another split than"),
        (["--data.source=csv:x", "--data.val_split=test"], "data.val_split: 'test' must be another split than"),
        (
            ["--data.source=csv:x", "--data.val_split=val", "--data.val_fraction=0.2"],
            "data.val_fraction: has no effect (with data.val_split val)",
        ),
        (
            ["--data.source=csv:x", "--data.test_split=b", "--data.test_fraction=0.2"],
            "data.test_split: has no effect (with data.test_fraction)",
        ),
        (["--data.val_split=val"], "data.val_split: has no effect (with source digits)"),
        (["--data.on_error=skip"], "data.on_error: has no effect (with source digits)"),
        (
            ["--data.source=imagefolder:x", "--data.test_split=train"],
            "data.test_split: 'train' is also data.train_split, so that the accuracy would be that of training samples",
        ),
        (["--data.test_split=val"], "data.test_split: has no effect (with source digits)"),
        (["--data.source=imagefolder:x", "--data.image_column=img"], "data.image_column: has no effect (with this source)"),
        (["--data.unlabeled_split=x"], "data.unlabeled_split: has no effect (without data.unlabeled)"),
        (["--data.unlabeled_ratio=1"], "data.unlabeled_ratio: has no effect (without data.unlabeled)"),
        (["--data.unlabeled=digits"], "data.unlabeled: 'digits' must start with one of hub:, parquet:,"),
        (["--data.unlabeled=csv:x"], "data.unlabeled: has no effect without a teacher, the only thing to learn from"),
        (["--data.unlabeled=csv:x", "--data.unlabeled_ratio=0"], "data.unlabeled_ratio: 0.0 must be above 0, or null"),
        (
            ["--data.unlabeled=imagefolder:x", "--data.image_column=img"],
            "data.image_column: has no effect (with source digits)",
        ),
        (["--data.views", "0"], "data.views: 0 must be at least 1"),
        (["--data.mean", "[0.5,0.5,0.5]"], "data.mean and data.std: one of them is set; set both or none"),
        (["--data.mean", "[0.5]", "--data.std", "[1,1,1]"], "three numbers"),
        (["--data.mean", "[0,0,0]", "--data.std", "[0,1,1]"], "must be above 0"),
        (["--data.pixel_range", "[0]"], "data.pixel_range: [0.0] must be [low, high] with low below high, such as [0, 4095]"),
        (["--data.pixel_range", "[1, 1]"], "data.pixel_range: [1.0, 1.0] must be [low, high] with low below high"),
        (["--data.pixel_range", "[0, .inf]"], "data.pixel_range: [0.0, inf] must be [low, high]"),
        (["--data.background", "gray"], "data.background"),
        (["--data.transform", "flip"], "data.transform"),
        (["--model.arch", "resnet18"], "model.arch: 'resnet18' must start with"),
        (["--name", "a/b"], "name: 'a/b' must be a single directory name"),
        (["--distill.alpha", "0.5"], "distill: has no effect without a teacher"),
        (["--teacher.run", "x", "--teacher.arch", "torchvision/resnet50"], "set either teacher.run"),
        (["--teacher.run", "x", "--teacher.stem", "cifar"], "teacher.stem: has no effect"),
        (["--teacher.arch", "torchvision/resnet50"], "teacher.weights: null, but a teacher must be trained"),
        (["--teacher.run", "x", "--teacher.class_map", "[]"], "teacher.class_map: [] must name at least one class"),
        (["--teacher.run=x", "--teacher.image_size=0"], "teacher.image_size: 0 must be at least 1"),
        (["--teacher.run=x", "--teacher.image_size=4097"], "teacher.image_size: 4097 must be at most 4096"),
        (["--teacher.run=x", "--teacher.interpolation=nearest"], "teacher.interpolation"),
        (["--teacher.run=x", "--teacher.crop_pct=0"], "teacher.crop_pct: 0.0 must be above 0 and at most 1"),
        (["--teacher.run=x", "--teacher.crop_pct=1.15"], "teacher.crop_pct: 1.15 must be above 0 and at most 1"),
        (["--teacher.run=x", "--teacher.crop_pct=0.001"], "teacher.crop_pct: 0.001 resizes views to 32000 pixels, of which"),
        (
            ["--teacher.run", "x", "--data.source=parquet:x", "--data.label_column=null", "--teacher.class_map=auto"],
            "teacher.class_map: has no effect (with data.label_column null the classes are the teacher's)",
        ),
        (["--teacher.run", "x", "--teacher.min_accuracy", "85"], "teacher.min_accuracy: 85.0 must be at least 0 and at most 1"),
        (
            ["--teacher.arch", "torchvision/resnet50", "--teacher.weights", "w", "--teacher.mean", "[0.5, 0.5, 0.5]"],
            "teacher.mean and teacher.std: one of them is set; set both or none",
        ),
        (
            ["--teacher.arch", "torchvision/resnet50", "--teacher.weights", "w.safetensors"],
            "teacher.mean and teacher.std: missing; with a weights file set those",
        ),
        (["--teacher.run", "x", "--role", "teacher"], "role: teacher has no effect"),
        (["--teacher.run", "x", "--distill.alpha", "1.5"], "distill.alpha: 1.5 must be at least 0 and at most 1"),
        (
            ["--teacher.run", "x", "--distill.temperature", "0.009"],
            "distill.temperature: 0.009 must be at least 0.01 and at most 1000",
        ),
        (["--teacher.run", "x", "--distill.temperature", "1001"], "distill.temperature: 1001.0 must be at least 0.01"),
        (
            ["--teacher.run", "x", "--distill.temperature", "{start: 0.5, floor: 0.001, decay: 0.9}"],
            "distill.temperature.floor: 0.001 must be at least 0.01",
        ),
        (
            ["--teacher.run", "x", "--distill.temperature", "{kind: linear, start: 2000, end: 5000}"],
            "distill.temperature.end: 5000.0 must be at least 0.01",
        ),
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
        (
            ["--teacher.run", "x", "--distill.features.mse.weight", "{start: 0, floor: 0, decay: 0.9}"],
            "distill.features.mse.weight: 0, so that the term has no effect",
        ),
        (["--teacher.run", "x", "--distill.features.mse.weight", "-1"], "distill.features.mse.weight: -1.0 must be at least 0"),
        (
            ["--teacher.run", "x", "--distill.features.mse.layers", "[a, a]"],
            "['a', 'a'] must name at least one module, each once",
        ),
        (
            ["--teacher.outputs=cached", "--teacher.cache.dir=x", "--distill.features.mse.layers=auto"],
            "distill.features.mse.layers: auto needs the teacher's network, but neither teacher.run nor teacher.arch is set",
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
            ["--teacher.run=x", "--distill.temperature=2", "--distill.logits.args={divergence: mse, t_squared: false}"],
            "distill.temperature: has no effect (with distill.logits.args.divergence mse)",
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
        (["--data.transform", "none", "--data.view_seed", "1"], "data.view_seed: has no effect (with transform none)"),
        (["--data.transform", "none", "--data.views", "3"], "data.views: has no effect (with transform none"),
        (["--data.transform={random_crop: {padding: 0}}"], "data.transform.random_crop.padding: 0 must be at least 1"),
        (["--data.transform.random_crop.padding=33"], "data.transform.random_crop.padding: 33 must be at most data.image_size"),
        (["--data.transform={random_crop: {}}"], "data.transform.random_crop.padding: missing"),
        (
            ["--data.transform={random_horizontal_flip: {}, random_resized_crop: {}}"],
            "data.transform.random_resized_crop: must be the first transform",
        ),
        (["--data.transform.color_jitter.hue=0.7"], "data.transform.color_jitter.hue: [-0.7, 0.7] must be [low, high]"),
        (
            ["--data.transform.random_erasing.value=[0, 0, 256]"],
            "data.transform.random_erasing.value: [0, 0, 256] must be three",
        ),
        (["--data.transform.mixup.alpha=0"], "data.transform.mixup.alpha: 0.0 must be above 0 and at most 1000"),
        (["--data.transform.cutmix.p=1.5"], "data.transform.cutmix.p: 1.5 must be above 0 and at most 1"),
        (
            ["--data.transform={mixup: {}, cutmix: {p: 0.5}}"],
            "data.transform.mixup.p: 1.0 and cutmix.p: 0.5 must sum to at most 1",
        ),
        (
            ["--data.transform={cutmix: {}, random_horizontal_flip: {}}"],
            "data.transform.cutmix: must come after all other transforms",
        ),
        (["--data.crop_pct=0"], "data.crop_pct: 0.0 must be above 0 and at most 1"),
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
        (
            ["--optim.norm_bias_weight_decay=false", "--optim.weight_decay=0"],
            "optim.norm_bias_weight_decay: has no effect (with optim.weight_decay 0)",
        ),
        (["--model.freeze=[fc, conv1, fc]"], "model.freeze: fc is listed more than once"),
        (["--train.class_weights=[1, -1]"], "train.class_weights: [1.0, -1.0] must be at least 0 each"),
        (["--train.class_weights={a: 1, b: 1.0}"], "has no effect (each weight is 1)"),
        (["--train.class_weights=[]"], "has no effect (each weight is 1)"),
        (["--train.class_weights=even"], "train.class_weights: must be one of balanced or a list"),
        (
            ["--teacher.run=x", "--distill.alpha=1", "--train.class_weights=balanced"],
            "train.class_weights: has no effect (distill.alpha: 1",
        ),
        (
            ["--teacher.run=x", "--data.label_column=null", "--distill.label_weight=0", "--data.sampling=balanced"],
            "data.sampling: has no effect (with data.label_column null",
        ),
        (["--train.early_stopping_epochs=0"], "train.early_stopping_epochs: 0 must be at least 1"),
        (["--train.early_stopping_epochs=9"], "the training could end after epoch 10 at the earliest, and train.epochs is 10"),
        (
            ["--train.early_stopping_epochs=5", "--train.eval_every_epochs=4"],
            "the training could end after epoch 12 at the earliest",
        ),
        (["--train.early_stopping_epochs=3", "--data.val_fraction=0"], "train.early_stopping_epochs: has no effect"),
        (["--checkpoint.keep_best=true", "--data.val_fraction=0"], "checkpoint.keep_best: has no effect"),
        (["--train.precision", "fp8"], "train.precision"),
        (["--checkpoint.keep", "0"], "checkpoint.keep: 0 must be at least 1"),
        (["--checkpoint.resume", "maybe"], "checkpoint.resume"),
        (["--tracking.timeout_s", "0"], "tracking.timeout_s"),
    ],
)
def test_each_rule_names_field_value_and_rule(flags, part):
    assert part in mistakes(*flags)


def test_a_source_without_prefix_suggests_what_is_meant(tmp_path):
    message = mistakes(f"--data.source={tmp_path}")
    assert message.startswith(f"data.source: '{tmp_path}' must be digits or start with one of hub:")
    assert f"csv:, import:; did you mean imagefolder:{tmp_path}?" in message
    assert "; did you mean digits?" in mistakes("--data.source=digit")


def test_a_name_that_is_too_long_for_a_file_is_not_one():
    assert mistakes(f"--data.source={'9' * 300}").startswith("data.source: '999")
    assert weights_info("9" * 300, "torchvision/resnet18") == WeightsInfo()


def test_alpha_above_one_needs_a_label_weight():
    flags = ["--teacher.run=x", "--distill.alpha=5", "--distill.label_weight=1"]
    assert parse(*flags).distill.alpha == 5.0
    assert mistakes(*flags[:2]) == "distill.alpha: 5.0 must be at least 0 and at most 1 (on the command line)"


@pytest.mark.parametrize("temperature", [0.01, 1000, {"start": 1000, "floor": 0.01, "decay": 0.5}])
def test_temperatures_from_a_hundredth_to_a_thousand_are_valid(temperature):
    found = parse("--teacher.run=x", f"--distill.temperature={temperature}").distill.temperature
    assert found == (Schedule(**temperature) if isinstance(temperature, dict) else temperature)


@pytest.mark.parametrize(
    ("distill", "field"),
    [
        ("{label_weight: 0}", "distill.label_weight: 0"),
        ("{label_weight: {kind: constant, start: 0}}", "distill.label_weight: 0"),
        ("{label_weight: {start: 0, floor: 0, decay: 0.9}}", "distill.label_weight: 0"),
        ("{alpha: 1}", "distill.alpha: 1"),
        ("{alpha: {kind: cosine, start: 1, end: 1}}", "distill.alpha: 1"),
        ("{alpha: {start: 1, floor: 0.5, decay: 1}}", "distill.alpha: 1"),
        ("{alpha: {start: 0.5, floor: 1, decay: 0.9}}", "distill.alpha: 1"),
    ],
)
def test_label_smoothing_without_a_weight_of_the_labels_has_no_effect(distill, field):
    message = mistakes("--teacher.run=x", f"--distill={distill}", "--train.label_smoothing=0.1")
    assert message.startswith(f"train.label_smoothing: 0.1 has no effect ({field}")


@pytest.mark.parametrize(
    "distill",
    [
        "{alpha: 0.9}",
        "{alpha: 1, label_weight: 0.1}",
        "{alpha: {start: 1, floor: 0.5, decay: 0.9}}",
        "{alpha: {kind: linear, start: 1, end: 0}}",
        "{label_weight: {kind: linear, start: 0, end: 1}}",
    ],
)
def test_label_smoothing_of_labels_that_have_a_weight_at_some_step_is_valid(distill):
    config = parse("--teacher.run=x", f"--distill={distill}", "--train.label_smoothing=0.1")
    assert config.train.label_smoothing == 0.1 and labels_without_weight(config) is None


def test_an_alpha_above_one_is_one_mistake():
    message = mistakes("--teacher.run=x", "--distill.alpha=1.5", "--train.label_smoothing=0.1")
    assert message.startswith("distill.alpha: 1.5 must be at least 0 and at most 1") and "label_smoothing" not in message


@pytest.mark.parametrize(
    ("distill", "is_unused"),
    [
        ("{alpha: 0}", True),
        ("{alpha: {start: 0, floor: 0, decay: 0.9}}", True),
        ("{alpha: 0, features: {mse: {}}}", False),
        ("{alpha: {kind: linear, start: 0, end: 1}}", False),
        ("{alpha: 0.1}", False),
    ],
)
def test_a_teacher_without_a_weight_is_reported(distill, is_unused):
    notices = notices_of_weights(parse("--teacher.run=x", f"--distill={distill}"))
    assert [notice.startswith("distill.alpha: 0 and no distill.features: the teacher has no weight") for notice in notices] == (
        [True] if is_unused else []
    )
    assert notices_of_weights(parse()) == []


def test_teachers_without_a_weight_are_named_in_the_plural():
    (notice,) = notices_of_weights(parse("--teachers.a.run=x", "--teachers.b.run=y", "--distill.alpha=0"))
    assert notice.endswith("set teachers to null for plain training")


def test_the_forms_of_a_class_map():
    assert parse("--teacher.run=x").teacher.class_map is None
    assert parse("--teacher.run=x", "--teacher.class_map=auto").teacher.class_map == "auto"
    assert parse("--teacher.run=x", "--teacher.class_map=[2, dog]").teacher.class_map == [2, "dog"]
    flags = ["--teacher.run=x", "--teacher.class_map.cat=3", "--teacher.class_map.7=dog"]
    assert parse(*flags).teacher.class_map == {"cat": 3, "7": "dog"}
    assert "teacher.class_map: must be one of auto or a list" in mistakes("--teacher.run=x", "--teacher.class_map=1.5")


def test_a_library_teacher_needs_no_mean_and_std():
    teacher = parse("--teacher.arch=torchvision/resnet50", "--teacher.weights=IMAGENET1K_V2").teacher
    assert teacher.mean is None and teacher.min_accuracy == "auto"


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
