"""Effect of every setting: each is read by code other than the parser and the rules, as a recorder in the configs shows."""

import sys

import pytest
from PIL import Image

from kd_accel.config.schema import Section
from tests.support import launching
from tests.support.image_files import encoded, write_parquet
from tests.support.in_process import cache, say, train
from tests.support.launching import metrics, summary
from tests.support.parsing import SECTIONS

RULES = ("validation.py", "loss_weights.py", "schedule_rules.py", "training_rules.py", "unlabeled_rules.py")
IN_CONFIG = (*RULES, "parsing.py", "help.py", "fields.py", "settings.py", "run_name.py")
NOT_READERS = (*(f"config/{name}" for name in IN_CONFIG), "pydantic")


@pytest.fixture
def read(monkeypatch):
    """Return the set of (class, field) of each setting that is read, except by pydantic and the config package."""
    found = set()
    plain = Section.__getattribute__

    def recording(section, name):
        if name in type(section).model_fields:
            reader = sys._getframe(1).f_code.co_filename
            if not any(part in reader for part in NOT_READERS):
                found.add((type(section).__name__, name))
        return plain(section, name)

    monkeypatch.setattr(Section, "__getattribute__", recording)
    return found


@pytest.mark.slow
def test_each_setting_is_read(tmp_path, teacher_run, read):
    (tmp_path / "data").mkdir()
    for split, count in (("train", 40), ("test", 8)):
        images = [encoded(Image.new("RGB", (32, 32), (5 * number, 4 * number, 3 * number))) for number in range(count)]
        write_parquet(tmp_path / "data", split, images, [number % 2 for number in range(count)])
    columns = [f"--data.source=parquet:{tmp_path}/data", "--data.image_column=img", "--data.val_fraction=0.2"]
    train(tmp_path / "parquet", *columns, "--train.batch_size=8", "--train.epochs=1", "--profile=1")
    schedules = ["--optim.schedule=step", "--optim.step_epochs=[1]", "--optim.name=adamw", "--train.ema_decay=0.9"]
    train(
        tmp_path / "other",
        *schedules,
        "--data.mean=[0.5, 0.5, 0.5]",
        "--data.std=[0.2, 0.2, 0.2]",
        "--train.epochs=2",
        "--tracking.wandb=offline",
    )
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={tmp_path}/cache"]
    kept = ["--data.views=2", f"--teacher.run={teacher_run}", *stored]
    feature = "--distill.features.mse={layers: [layer1], args: {pca_images: 64}}"
    temperatures = [
        "--distill.temperature={start: 4, end: 1, kind: linear, length: 2, unit: step}",
        "--distill.alpha={start: 0.9, floor: 0.5, decay: 0.9}",
        "--distill.label_weight=0.3",
    ]
    cache("build", *kept, feature)
    train(tmp_path / "cached", *kept, feature, *temperatures, "--train.epochs=2")
    own = ["--teacher.arch=import:tests.support.models:teacher", f"--teacher.weights={teacher_run}"]
    own += ["--data.unlabeled=import:tests.support.models:unlabeled_images", "--data.unlabeled_split=val"]
    train(tmp_path / "own", *own, "--teacher.mean=[0.5, 0.5, 0.5]", "--teacher.std=[0.2, 0.2, 0.2]", "--train.epochs=1")
    second = [flag.replace("--teacher.", "--teachers.second.") for flag in own if flag.startswith("--teacher.")]
    second += ["--teachers.second.mean=[0.5, 0.5, 0.5]", "--teachers.second.std=[0.2, 0.2, 0.2]", "--train.max_steps=1"]
    train(tmp_path / "several", f"--teachers.first.run={teacher_run}", *second)
    say(
        "bench",
        tmp_path / "other",
        "torchvision/resnet18",
        "--min_iterations=10",
        "--min_time_s=0.01",
        "--out",
        tmp_path / "bench.json",
    )
    chain = {"ReproduceConfig"}  # read in other processes, which tests/commands/test_reproduce.py starts
    every = {(each.__name__, name) for each in SECTIONS if each.__name__ not in chain for name in each.model_fields}
    assert every - read == set()


@pytest.mark.slow
def test_compiled_distillation_has_the_terms_of_an_eager_one(tmp_path, distilled):
    train(tmp_path / "eager", "--train.max_steps=4", *distilled)
    train(tmp_path / "compiled", "--train.max_steps=4", *distilled, "--train.compile=true")
    for one, two in zip(metrics(tmp_path / "eager", "train"), metrics(tmp_path / "compiled", "train"), strict=True):
        assert two["features/mse"] == pytest.approx(one["features/mse"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "more"),
    [
        ("student_to_teacher", ""),
        ("teacher_to_student", ", pca_images: 64"),
    ],
)
def test_each_direction_trains_in_two_processes(tmp_path, teacher_run, direction, more):
    settings = f"{{weight: 3.0, layers: [layer1, layer2], args: {{direction: {direction}{more}}}}}"
    flags = ["--optim.lr=0.01", f"--teacher.run={teacher_run}", f"--distill.features.mse={settings}"]
    launching.train(tmp_path / "run", *flags, processes=2)
    terms = [line["features/mse"] for line in metrics(tmp_path / "run", "train")]
    assert terms[-1] < terms[0]
    assert summary(tmp_path / "run")["agreement"] is not None


def test_fine_tuning_starts_from_the_given_weights(tmp_path, teacher_run):
    flags = ["--model.arch=import:tests.support.models:teacher", f"--model.weights={teacher_run}", "--train.max_steps=2"]
    same = train(tmp_path / "same", *flags, "--optim.lr=1e-9")
    assert "starts from random weights" not in same
    assert summary(tmp_path / "same")["accuracy"] == summary(teacher_run)["accuracy"]
    assert summary(tmp_path / "same")["tf32"] is None, "a CPU has none"
    digits = train(tmp_path / "digits", *flags, "--data.source=digits", "--data.transform=crop")
    assert "fc: starts from random weights" in digits
