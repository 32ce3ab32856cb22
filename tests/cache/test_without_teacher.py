"""Training from a cache whose teacher is not on the machine: the same student, and commands that need the teacher refuse."""

import json
import shutil
from pathlib import Path

import pytest

from kd_accel import api
from kd_accel.cache.manifest import read_spec
from kd_accel.cache.teacher_cache import TeacherCache
from kd_accel.commands import reproduce
from kd_accel.config.schema import ReproduceConfig
from tests.support import in_process
from tests.support.caches import FEATURE, RAW, files_of, flip_bit
from tests.support.image_files import write_folder
from tests.support.in_process import cache, say, train
from tests.support.launching import metrics, summary

COMMON = [
    "--model.arch=import:tests.support.models:student_with_everything",
    "--data.views=2",
    "--teacher.outputs=cached",
    "--distill.temperature={start: 4.0, floor: 2.0, decay: 0.9}",
]


def flags(cache_dir, *more, feature=FEATURE):
    return [*COMMON, feature, f"--teacher.cache.dir={cache_dir}", *more]


@pytest.fixture(scope="module")
def built(tmp_path_factory, teacher_run):
    """A cache with the logits and two projected layers."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    cache("build", *flags(directory, f"--teacher.run={teacher_run}"))
    return directory


@pytest.fixture
def copied(built, tmp_path):
    """Copy the cache as to another machine."""
    return Path(shutil.copytree(built, tmp_path / "copied"))


def weights(run_dir):
    return (Path(run_dir) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("feature", [FEATURE, RAW], ids=["projected", "raw"])
def test_the_student_is_that_of_a_training_with_the_teacher(tmp_path, teacher_run, feature):
    with_teacher = flags(tmp_path / "cache", f"--teacher.run={teacher_run}", feature=feature)
    cache("build", *with_teacher)
    train(tmp_path / "with", *with_teacher)
    shutil.move(tmp_path / "cache", tmp_path / "copied")
    text = train(tmp_path / "without", *flags(tmp_path / "copied", feature=feature))
    assert weights(tmp_path / "without") == weights(tmp_path / "with")
    assert metrics(tmp_path / "without") == metrics(tmp_path / "with")
    assert summary(tmp_path / "without") == summary(tmp_path / "with")
    (line,) = [line for line in text.splitlines() if "teacher: not set" in line]
    assert f"the outputs in {tmp_path / 'copied'} (import:tests.support.models:teacher, fingerprint " in line
    assert "precision float32" in line and "none was recomputed" in line
    (header,) = [line for line in text.splitlines() if line.startswith("teacher ")]
    assert f"cached in {tmp_path / 'copied'}" in header and f"{100 * summary(teacher_run)['accuracy']:.2f} %" in header


def test_the_storage_type_of_a_cache_without_its_teacher_has_an_effect(tmp_path, teacher_run, copied):
    """The comparison above can fail: outputs that were rounded give another student."""
    train(tmp_path / "live", *COMMON[:2], *COMMON[3:], FEATURE, f"--teacher.run={teacher_run}")
    train(tmp_path / "without", *flags(copied))
    assert weights(tmp_path / "without") != weights(tmp_path / "live")


def test_a_run_is_resumed_without_its_teacher(tmp_path, teacher_run, copied):
    with_teacher = flags(copied, f"--teacher.run={teacher_run}")
    train(tmp_path / "straight", *with_teacher)
    train(tmp_path / "stopped", *with_teacher, "--checkpoint.stop_after_steps=11")
    text = train(tmp_path / "stopped", *flags(copied))
    assert "teacher.run: " in next(line for line in text.splitlines() if "resumes with changed settings" in line)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "straight")
    train(tmp_path / "other", *flags(copied), "--checkpoint.stop_after_steps=11")
    train(tmp_path / "other", *with_teacher)
    assert weights(tmp_path / "other") == weights(tmp_path / "straight")


def test_a_run_of_a_typed_teacher_is_resumed_without_it(tmp_path, teacher_run):
    own = ["--teacher.arch=import:tests.support.models:teacher", "--teacher.mean=[0.5,0.5,0.5]", "--teacher.std=[0.2,0.2,0.2]"]
    with_teacher = flags(tmp_path / "cache", *own, f"--teacher.weights={teacher_run}", "--teacher.min_accuracy=null")
    cache("build", *with_teacher)
    train(tmp_path / "run", *with_teacher, "--checkpoint.stop_after_steps=11")
    train(tmp_path / "run", *flags(tmp_path / "cache", "--teacher.min_accuracy=null"))
    train(tmp_path / "straight", *with_teacher)
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_another_teacher_is_refused_at_a_resume(tmp_path, teacher_run, copied):
    """The cache has the outputs of another teacher: other weights, hence another fingerprint."""
    train(tmp_path / "run", *flags(copied), "--checkpoint.stop_after_steps=11")
    train(tmp_path / "finished", *flags(copied), "--train.max_steps=2")
    shutil.copytree(teacher_run, tmp_path / "teacher")
    flip_bit(tmp_path / "teacher/model.safetensors", at=-4)
    cache("build", *flags(tmp_path / "cache", f"--teacher.run={tmp_path / 'teacher'}"))
    for run, *more in (("run",), ("finished", "--train.max_steps=2")):
        assert "was trained with the teacher" in train(tmp_path / run, *flags(tmp_path / "cache"), *more, code=2)


def test_a_finished_run_needs_neither_teacher_nor_cache(tmp_path, copied):
    train(tmp_path / "run", *flags(copied), "--train.max_steps=2")
    assert "finished already" in train(tmp_path / "run", *flags(copied), "--train.max_steps=2")
    shutil.rmtree(copied)
    assert "finished already" in train(tmp_path / "run", *flags(copied), "--train.max_steps=2")


def test_other_data_classes_and_views_are_refused(tmp_path, copied, monkeypatch):
    paths = [f"{split}/{name}/{number}.png" for split in ("train", "test") for name in ("a", "b") for number in range(15)]
    write_folder(tmp_path / "other", paths)
    for more, message in (
        (["--data.view_seed=1"], "data.view_seed: 0 in the cache, 1 now"),
        (["--data.image_size=16"], "data.image_size: 32 in the cache, 16 now"),
        (["--data.views=3"], "lacks view 2"),
        (["--teacher.cache.dtype=float32"], "teacher.cache.dtype: float16 in the cache, float32 now"),
        ([f"--data.source=imagefolder:{tmp_path / 'other'}"], "class names"),
    ):
        assert message in train(tmp_path / "run", *flags(copied), *more, code=2), more
    monkeypatch.setenv("KD_TEST_NOISE_SEED", "9")
    assert "training samples have another image or label" in train(tmp_path / "run", *flags(copied), code=2)


def test_a_layer_that_is_not_stored_is_refused(tmp_path, copied):
    features = "--distill.features={mse: {layers: {layer2: fc}, args: {direction: both, pca_images: 64}}}"
    text = train(tmp_path / "run", *flags(copied, feature=features), code=2)
    assert "lacks the features of fc (distill.features.mse.layers), which need the teacher (stored: layer1, layer2)" in text


def test_damaged_files_are_refused(tmp_path, copied):
    shard = next(path for path in files_of(copied) if "train" in str(path))
    flip_bit(shard)
    assert "does not match its checksum" in train(tmp_path / "run", *flags(copied), code=2)
    assert "damaged" in cache("verify", *flags(copied), code=2)
    spec = json.loads((copied / "spec.json").read_text())
    (copied / "spec.json").write_text(json.dumps({**spec, "views": 9}))
    assert "spec.json" in train(tmp_path / "run", *flags(copied), code=2)
    shutil.rmtree(copied)
    assert "no cache found in" in train(tmp_path / "run", *flags(copied), code=2)


@pytest.mark.parametrize("command", [["cache", "build"], ["plan"]])
def test_commands_that_run_the_teacher_refuse(tmp_path, copied, command):
    before = files_of(copied)
    text = say(*command, *in_process.SMALL, *flags(copied), code=2)
    assert "neither teacher.run nor teacher.arch is set, but this command runs the teacher" in text
    assert files_of(copied) == before


def test_a_chain_builds_no_cache_without_the_teacher(tmp_path, teacher_run, copied, monkeypatch):
    steps = []

    def record(step):
        steps.append(step.what)
        if step.what.startswith("training"):
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run/summary.json").write_text("{}")

    monkeypatch.setattr(reproduce, "_run", record)
    (tmp_path / "student.yaml").write_text("data: {views: 2}")
    config = ReproduceConfig(runs=[f"{tmp_path}/student.yaml"], launch="launch/cpu2.yaml", report_dir=f"{tmp_path}/report")
    named = [f"--run_dir={tmp_path / 'run'}", "--name=student", *flags(copied)]
    reproduce.run_chain(config, overrides=named)
    assert steps == ["training of student", "bench", "report"]
    shutil.rmtree(tmp_path / "run")
    steps.clear()
    reproduce.run_chain(config, overrides=[*named, f"--teacher.run={teacher_run}"])
    assert steps[0] == "cache of student"


def test_verify_checks_every_byte_and_recomputes_nothing(copied):
    assert "no sample was recomputed, because the config has no teacher" in cache("verify", *flags(copied))
    report = json.loads(cache("verify", *flags(copied), "--json").splitlines()[-1])
    assert report["is_intact"] and report["largest_difference"] is None


def test_a_teacher_that_is_missing_is_not_left_out_silently(tmp_path, copied):
    text = train(tmp_path / "run", *flags(copied, "--teacher.run=nowhere"), code=2)
    assert "teacher.run: no finished run in nowhere" in text and "set teacher.run to null" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher.outputs=live"], "without a teacher, set teacher.outputs to cached"),
        (["--teacher.outputs=mixed"], "without a teacher, set teacher.outputs to cached"),
        (["--teacher.mean=[0.5, 0.5, 0.5]"], "teacher.mean: has no effect (without teacher.run and teacher.arch"),
        (["--teacher.weights=w.safetensors"], "teacher.weights: has no effect"),
        (["--teacher.class_map=auto"], "teacher.class_map: has no effect"),
        (["--teacher.image_size=32"], "teacher.image_size: has no effect"),
        (["--teacher.interpolation=bicubic"], "teacher.interpolation: has no effect"),
        (["--teacher.crop_pct=0.9"], "teacher.crop_pct: has no effect"),
    ],
)
def test_settings_that_need_a_teacher_are_refused(tmp_path, copied, more, message):
    assert message in train(tmp_path / "run", *flags(copied, *more), code=2)


def test_python_opens_the_same_cache(copied):
    opened = TeacherCache.open(copied)
    assert opened.fingerprint == read_spec(copied).fingerprint and set(opened.shapes) == {"layer1", "layer2"}
    result = api.train(
        {
            "data": {"source": "import:tests.support.models:images", "views": 2, "transform": "crop_flip", "val_fraction": 0.2},
            "model": {"arch": "import:tests.support.models:student"},
            "teacher": {"outputs": "cached", "cache": {"dir": copied}},
            "train": {"batch_size": 16, "max_steps": 2},
            "tracking": {"wandb": "disabled"},
        },
        run_dir=copied.parent / "run",
    )
    assert result.summary["role"] == "distilled" and result.summary["teacher_accuracy"] > 0
