"""Mistakes in a config: all of them at once, by name, with the nearest key, before torch is loaded."""

import subprocess
import sys
import time

import pytest
import yaml

from kd_accel.cli import main
from kd_accel.config.parsing import build_parser, flatten, load_config_file, parse_config, save_config
from kd_accel.config.schema import BenchConfig, ReproduceConfig, RunConfig, Schedule
from kd_accel.errors import UserError


def parse(*argv):
    return parse_config(RunConfig, argv, parser=build_parser(RunConfig, prog="kd-accel train", description=""))[0]


def mistakes(*argv):
    with pytest.raises(UserError) as caught:
        parse(*argv)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path):
    def write(settings, name="run.yaml"):
        path = tmp_path / name
        path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
        return str(path)

    return write


def test_later_files_and_then_flags_win(config_file):
    first = config_file({"seed": 1, "optim": {"lr": 0.1, "weight_decay": 0.5}, "train": {"epochs": 3}}, "a.yaml")
    second = config_file({"seed": 2, "optim": {"lr": 0.2}}, "b.yaml")
    config = parse("--config", first, "--config", second, "--optim.lr", "5e-1")
    assert (config.seed, config.optim.lr, config.optim.weight_decay, config.train.epochs) == (2, 0.5, 0.5, 3)


def test_a_number_or_a_schedule(config_file):
    path = config_file(
        {"teacher": {"run": "x"}, "distill": {"temperature": {"start": 0.5, "floor": 0.3, "decay": 0.95}, "alpha": 0.7}}
    )
    config = parse("--config", path, "--distill.alpha", "0.6")
    assert config.distill.temperature == Schedule(start=0.5, floor=0.3, decay=0.95)
    assert config.distill.alpha == 0.6


def test_a_saved_config_reads_back_equal(tmp_path):
    config = parse(
        "--teacher.run", "x", "--distill.feature.weight", "0.2", "--data.mean", "[0.1,0.2,0.3]", "--data.std", "[1,1,1]"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config_file(RunConfig, tmp_path / "config.yaml") == config


def test_all_mistakes_come_together_with_the_nearest_key(config_file):
    path = config_file({"optim": {"lr": "fast", "momentun": 0.9}, "distil": {"alpha": 1}, "train": {"epochs": 0}})
    text = mistakes("--config", path, "--trian.epochs", "3", "--seed=x")
    for part in (
        "7 mistakes",
        "optim.lr: must be a number, not 'fast'",
        "did you mean optim.momentum?",
        "did you mean distill?",
        "distill: has no effect without a teacher",
        "did you mean train?",
        "train.epochs: 0 must be at least 1",
        "seed: must be a whole number, not 'x'",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--data.source", "floppy"], "data.source: 'floppy' must be"),
        (["--data.val_fraction", "1"], "data.val_fraction"),
        (["--data.views", "0"], "data.views: 0 must be at least 1"),
        (["--data.mean", "[0.5,0.5,0.5]"], "give both or none"),
        (["--data.mean", "[0.5]", "--data.std", "[1,1,1]"], "three numbers"),
        (["--data.mean", "[0,0,0]", "--data.std", "[0,1,1]"], "must be above 0"),
        (["--data.augment", "flip"], "data.augment"),
        (["--model.arch", "resnet18"], "model.arch: 'resnet18' must start with"),
        (["--name", "a/b"], "name: 'a/b' must be a plain directory name"),
        (["--distill.alpha", "0.5"], "distill: has no effect without a teacher"),
        (["--teacher.run", "x", "--teacher.arch", "torchvision/resnet50"], "give either teacher.run"),
        (["--teacher.run", "x", "--teacher.stem", "cifar"], "teacher.stem: has no effect"),
        (["--teacher.arch", "torchvision/resnet50"], "must have learned something"),
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
            ["--teacher.run", "x", "--distill.feature.weight", "0"],
            "distill.feature.weight: 0, so the term has no effect",
        ),
        (["--teacher.run", "x", "--distill.feature.layers", "[a, a]"], "each once"),
        (["--teacher.run", "x", "--teacher.layers", "[a]", "--distill.feature.weight", "0.1"], "they are pairs"),
        (
            ["--teacher.run", "x", "--distill.feature", "{direction: student_to_teacher, pca_images: 64}"],
            "distill.feature.pca_images: has no effect (no PCA is fitted)",
        ),
        (["--optim.lr", "0"], "optim.lr: 0.0 must be above 0"),
        (["--optim.name", "adamw", "--optim.nesterov", "true"], "optim.nesterov: has no effect (with optimizer adamw)"),
        (["--optim.betas", "[0.9, 0.99]"], "optim.betas: has no effect (with optimizer sgd)"),
        (["--optim.step_epochs", "[3]"], "optim.step_epochs: has no effect (with onecycle)"),
        (["--optim.schedule", "step", "--optim.step_epochs", "[3, 10]"], "must lie above 0 and below train.epochs (10)"),
        (["--optim.momentum", "1"], "optim.momentum: 1.0 must be below 1"),
        (["--seed", "-1"], "seed: -1 must be at least 0"),
        (["--data.image_column", "img"], "data.image_column: has no effect (with source digits)"),
        (["--data.test_split", "val"], "data.test_split: has no effect (with source digits)"),
        (["--data.source", "imagefolder:x", "--data.label_column", "y"], "data.label_column: has no effect (with this source)"),
        (["--data.augment", "none", "--data.view_seed", "1"], "data.view_seed: has no effect (with augment none)"),
        (["--data.augment", "none", "--data.views", "3"], "data.views: has no effect (with augment none"),
        (["--data.augment", "resized_crop", "--data.crop_padding", "2"], "data.crop_padding: has no effect"),
        (["--teacher.run", "x", "--teacher.layers", "[a]"], "teacher.layers: has no effect without distill.feature"),
        (["--data.val_fraction", "0", "--train.eval_every_epochs", "2"], "train.eval_every_epochs: has no effect"),
        (["--teacher.run", "x", "--teacher.outputs", "cached"], "teacher.cache_dir: missing"),
        (
            ["--teacher.run", "x", "--teacher.outputs", "cached", "--teacher.cache_dir", "c"],
            "data.views: null means new views in each epoch",
        ),
        (["--teacher.run", "x", "--teacher.outputs", "mixed"], "without distill.feature use cached"),
        (["--teacher.run", "x", "--teacher.dtype", "int8"], "teacher.dtype: has no effect (with outputs live)"),
        (["--teacher.run", "x", "--teacher.shard_mib", "1"], "teacher.shard_mib: has no effect (with outputs live)"),
        (["--teacher.run", "x", "--teacher.shard_mib", "0"], "teacher.shard_mib: 0.0 must be above 0"),
        (["--optim.schedule", "step"], "optim.step_epochs: empty"),
        (["--optim.warmup_fraction", "1"], "optim.warmup_fraction"),
        (["--optim.clip_norm", "0"], "optim.clip_norm"),
        (["--train.batch_size", "10", "--train.grad_accum_steps", "4"], "does not divide by train.grad_accum_steps"),
        (["--train.ema_decay", "1"], "train.ema_decay"),
        (["--train.precision", "fp8"], "train.precision"),
        (["--checkpoint.keep", "0"], "checkpoint.keep: 0 must be at least 1"),
        (["--checkpoint.resume", "maybe"], "checkpoint.resume"),
        (["--tracking.timeout_s", "0"], "tracking.timeout_s"),
    ],
)
def test_each_rule_names_field_value_and_rule(flags, part):
    assert part in mistakes(*flags)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1", "is not YAML that can be read (line 1, column 6: expected ',' or ']'"),
        ("- 1\n- 2\n", "holds a list; it must hold settings as `key: value`"),
        ("# nothing\n", "holds nothing; it must hold settings"),
        ("optim:\n  lr: 0.1\n  lr: 0.2\n", "(line 3, column 3: lr stands there twice)"),
        ("name: 2024-13-45\n", "(month must be in 1..12)"),
        (b"\xff\xfe\x00", "is not YAML that can be read ('utf-8'"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, part):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert part in mistakes("--config", str(path))


def test_a_file_that_cannot_be_read(tmp_path):
    assert mistakes("--config", "nowhere.yaml").startswith("config: cannot read nowhere.yaml (No such file")
    assert mistakes("--config", str(tmp_path)).endswith("(Is a directory); name a YAML file")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("optim: 3", "optim: must be settings as `key: value`, not 3"),
        ("data:", "data: must be settings as `key: value`, not null"),
        ("teacher: run", "teacher: must be settings as `key: value` or null, not 'run'"),
        ("data: {mean: [a, 1]}", "data.mean: must be a list (of each item: a number) or null, not ['a', 1]"),
        ("model: {arch_args: 3}", "model.arch_args: must be settings as `key: value`, not 3"),
        ("train: {epochs: 1.5}", "train.epochs: must be a whole number, not 1.5"),
        ("train: {compile: 3}", "train.compile: must be true or false, not 3"),
        ("train: {precision: no}", "train.precision: must be one of no, fp16, bf16, not False; put it in quotes"),
        ("name: 2024", "name: must be text, not 2024; put it in quotes"),
        ("datä: {}", "datä: no such setting; did you mean data?"),
        ("3: 4", "3: no such setting"),
        (
            "teacher: {run: x}\ndistill: {alpha: fast}",
            "distill.alpha: must be a number or settings as `key: value`, not 'fast'",
        ),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_sentence(config_file, settings, told):
    path = config_file(settings)
    assert mistakes("--config", path) == f"{told} (in {path})"


@pytest.mark.parametrize("kind", [BenchConfig, ReproduceConfig])
def test_a_file_of_another_command_is_one_sentence(config_file, kind):
    path = config_file({"name": "x", "data": {}, "train": {"epochs": 3}})
    with pytest.raises(UserError) as caught:
        parse_config(kind, ["--config", path], parser=build_parser(kind, prog="x", description=""))
    said = "is written for another command: no setting in it (data, name, train) is of this"
    assert str(caught.value) == f"config: {path} {said}"


def test_a_misspelt_key_of_a_schedule_is_one_sentence(config_file):
    schedule = {"start": 0.5, "flor": 0.3, "decay": 0.95}
    path = config_file({"teacher": {"run": "x"}, "distill": {"temperature": schedule}})
    told = "distill.temperature.flor: no such setting; did you mean distill.temperature.floor?"
    assert mistakes("--config", path) == f"{told} (in {path})"
    flag = "--distill.temperature={start: 0.5, flor: 0.3, decay: 0.95}"
    assert mistakes("--teacher.run=x", flag) == f"{told} (in the command line)"


def test_a_schedule_without_its_start(config_file):
    path = config_file({"teacher": {"run": "x"}, "distill": {"alpha": {"floor": 0.3, "decay": 0.95}}})
    assert mistakes("--config", path).startswith("distill.alpha.start: missing, and without a default")
    assert parse("--config", path, "--distill.alpha.start=0.4").distill.alpha.start == 0.4


def test_numbers_as_people_write_them(config_file):
    config = parse("--config", config_file("optim: {lr: 1e-3}\ndata: {mean: [1e-1, 0.2, 0.3], std: [1, 1, 1]}\nseed: '3'\n"))
    assert (config.optim.lr, config.data.mean, config.seed) == (0.001, [0.1, 0.2, 0.3], 3)
    assert parse("--name=2024", "--optim.betas+=0.5", "--optim.betas=[0.9, 0.999]").name == "2024"


def test_a_section_in_a_file_of_its_own(config_file):
    section = config_file("source: digits\nimage_size: 16\n", "data.yaml")
    assert parse("--data", section).data.image_size == 16
    assert "data.image_siz: no such setting; did you mean data.image_size?" in mistakes(
        "--data", config_file("image_siz: 16\n", "misspelled.yaml")
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["run.yaml"], "run.yaml: stands alone; a config file is given as --config FILE, a setting as --a.b VALUE"),
        (["--confg", "run.yaml"], "--confg: no such option; did you mean --config? (in the command line)"),
        (["--confg=run.yaml"], "--confg: no such option; did you mean --config? (in the command line)"),
        (["--print_confg"], "--print_confg: no such option; did you mean --print_config? (in the command line)"),
        (["-c", "run.yaml"], "-c: no such option; a setting is given as --a.b VALUE"),
        (["--seed", "--name=x"], "--seed: has no value; write --seed VALUE"),
        (["--seed"], "--seed: has no value; write --seed VALUE"),
        (["--name", "[1", "--seed=x"], "seed: must be a whole number, not 'x' (in the command line)"),
    ],
)
def test_a_slip_on_the_command_line_is_one_sentence(flags, told):
    assert mistakes(*flags) == told


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--train.epochs=1"],
            "train: is a setting of the trainings, not of the chain; write it after --, as in: -- --train.epochs=1"
            " (in the command line)",
        ),
        (
            ["--seed", "3"],
            "seed: is a setting of the trainings, not of the chain; write it after --, as in: -- --seed=3"
            " (in the command line)",
        ),
        (["--bench.thread=1"], "bench.thread: no such setting; did you mean bench.threads? (in the command line)"),
    ],
)
def test_settings_of_the_trainings_given_to_the_chain(flags, told):
    chain = ["--runs=[a.yaml]", "--launch=x", "--report_dir=y"]
    with pytest.raises(UserError) as caught:
        parse_config(ReproduceConfig, [*chain, *flags], parser=build_parser(ReproduceConfig, prog="x", description=""))
    assert str(caught.value) == told


def test_required_fields_of_a_chain():
    with pytest.raises(UserError, match="^runs, launch, report_dir: missing, and without a default; set"):
        parse_config(ReproduceConfig, [], parser=build_parser(ReproduceConfig, prog="x", description=""))


@pytest.mark.parametrize(
    ("kind", "prefix", "flags"),
    [
        (BenchConfig, "", []),
        (ReproduceConfig, "bench.", ["--runs=[a.yaml]", "--launch=x", "--report_dir=y"]),
    ],
)
def test_impossible_measurements(kind, prefix, flags):
    flags = [
        *flags,
        f"--{prefix}batch_sizes=[1, 0]",
        f"--{prefix}threads=0",
        f"--{prefix}cuda_graph=true",
        f"--{prefix}device=cpu",
    ]
    with pytest.raises(UserError) as caught:
        parse_config(kind, flags, parser=build_parser(kind, prog="x", description=""))
    assert f"{prefix}threads: 0 must be at least 1" in str(caught.value)
    assert f"{prefix}batch_sizes: [1, 0] must list at least one number, each at least 1" in str(caught.value)
    assert f"{prefix}cuda_graph: has no effect with device cpu; leave it out" in str(caught.value)


def test_an_abbreviation_is_a_misspelt_key():
    assert "train.epoch: no such setting; did you mean train.epochs?" in mistakes("--train.epoch=1")


def test_flatten_gives_the_names_that_a_person_types():
    assert flatten({"a": {"b": {"c": 1}, "d": {}}, "e": [1]}) == {"a.b.c": 1, "a.d": {}, "e": [1]}


def run_program(*argv):
    started_at = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "kd_accel", *argv], capture_output=True, text=True, check=False)
    return done, time.perf_counter() - started_at


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["report", "run"], "missing: --out (usage: kd-accel report RUN ... --out DIR [--bench FILE])"),
        (["report"], "missing: RUN, --out (usage: kd-accel report RUN ... --out DIR [--bench FILE])"),
        (["evaluate", "a", "b"], "b: one argument too many (usage: kd-accel evaluate RUN [--split test|val])"),
        (["evaluate", "a", "--splt=val"], "--splt: no such option; did you mean --split? (usage: kd-accel evaluate"),
        (["evaluate", "a", "--split=vall"], "invalid choice: 'vall' (choose from 'test', 'val') (usage: kd-accel evaluate"),
        (["bench"], "missing: RUN_OR_ARCH (usage: kd-accel bench RUN_OR_ARCH ... [--out FILE] [--config FILE ...]"),
        (["bench", "x", "--batch_sizes", "many"], "batch_sizes: must be a list (of each item: a whole number), not 'many'"),
        (["reproduce", "chain.yaml"], "chain.yaml: stands alone; a config file is given as --config FILE"),
        (["bench", "x", "--ot=y"], "--ot: no such option; did you mean --out?"),
    ],
)
def test_arguments_of_a_command(argv, told, capsys):
    with pytest.raises(SystemExit) as left:
        main(argv)
    assert left.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kd-accel: ") and told in line


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--optim.lrr", "1"], 2),
        (["train", "--config", "nowhere.yaml"], 2),
        (["trian"], 2),
        (["report"], 2),
        (["reproduce"], 2),
        (["reproduce", "--print_config"], 0),
        (["bench", "--batch_sizes", "many"], 2),
        (["reproduce", "--runs", "[nowhere.yaml]", "--launch", "pyproject.toml", "--report_dir", "x"], 2),
    ],
)
def test_the_program_answers_at_once_without_a_traceback(argv, code):
    done, elapsed_s = min((run_program(*argv) for _ in range(2)), key=lambda result: result[1])
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert elapsed_s < 1.5
    assert (done.stderr.startswith("kd-accel: ") and done.stdout == "") if code else done.stdout
