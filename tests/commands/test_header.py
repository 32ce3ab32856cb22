"""Header of a start: its lines, their values in each kind of training, and the page that explains it."""

import re
from pathlib import Path

import pytest
import torch

from kd_accel.builders.header import described_teacher
from kd_accel.config.schema import CacheConfig, TeacherConfig
from tests.support import launching
from tests.support.in_process import cache, train
from tests.support.launching import summary

PAGE = (Path(__file__).parents[2] / "docs/start.md").read_text()
NAMES = ["run", "device", "processes", "precision", "model", "data", "samples", "classes", "views", "steps", "start", "teacher"]


def header(text):
    """Return {name: value} of the first block of aligned lines in an output."""
    lines = text.splitlines()
    found = {}
    for line in lines[next(number for number, line in enumerate(lines) if re.match(r"(run|cache) {7,}", line)) :]:
        matched = re.fullmatch(r"([a-z]+) +(\S.*)", line)
        if not matched or line.index(matched[2]) != 12:
            break
        found[matched[1]] = matched[2]
    return found


def test_a_training_begins_with_its_header(tmp_path):
    text = train(tmp_path / "run", "--train.max_steps=10", "--train.grad_accum_steps=2")
    found = header(text)
    assert list(found) == NAMES
    assert text.index("run ") == 0 and text.index("teacher ") < text.index("step 1/10")
    count = summary(tmp_path / "run")["parameters"]
    assert found["run"].endswith(f" (student) in {tmp_path / 'run'}")
    assert found["processes"] == "1" and found["precision"] == "float32"
    if not torch.cuda.is_available():
        assert re.fullmatch(r"CPU, 1 thread per process of \d+ \(no GPU: .+\)", found["device"])
    assert found["model"] == f"import:tests.support.models:student, {count:,} parameters"
    assert found["data"] == "import:tests.support.models:images, 32x32 pixels"
    assert found["samples"] == "128 train, 32 val, 41 test"
    assert found["views"] == "random_crop(padding=4), random_horizontal_flip(p=0.5); new ones in each epoch"
    assert found["steps"] == "10 in total, 8 per epoch, 16 samples each in 2 parts"
    assert found["start"] == "from scratch" and found["teacher"] == "none"


@pytest.mark.parametrize(
    ("source", "flag", "classes"),
    [
        ("images", "--data.val_fraction=0", "4, each with 40 training samples, 0 empty"),
        ("images_without_olive", "--data.val_fraction=0", "4, with 40 ('green') to 80 ('red') training samples, 1 empty"),
        ("images_without_olive", "--data.val_fraction=0.5", "4, with 20 ('green') to 40 ('red') training samples, 1 empty"),
    ],
)
def test_the_line_of_the_classes_counts_the_training_samples_of_each(tmp_path, source, flag, classes):
    text = train(tmp_path / "run", f"--data.source=import:tests.support.models:{source}", flag, "--train.max_steps=1")
    assert header(text)["classes"] == classes


def test_a_resumed_training_begins_with_its_position(tmp_path):
    text = train(tmp_path / "run", "--checkpoint.stop_after_steps=10")
    assert header(text)["start"] == "from scratch"
    resumed = header(train(tmp_path / "run"))
    assert list(resumed) == NAMES and resumed["start"] == "resumed after step 10 of 24 (epoch 2)"


def accuracy_of(run):
    figure = f"{100 * summary(run)['accuracy']:.2f} %"
    return f"accuracy {figure} on the test samples ({figure} in its own run)"


def test_the_accuracy_of_a_live_teacher_is_printed_once(tmp_path, teacher_run):
    text = train(tmp_path / "run", f"--teacher.run={teacher_run}", "--train.max_steps=1")
    assert header(text)["teacher"] == f"{teacher_run}, live, {accuracy_of(teacher_run)}"
    assert header(text)["run"].endswith(f"(distilled) in {tmp_path / 'run'}")
    assert text.count(accuracy_of(teacher_run)) == 1 and text.count("teacher's accuracy") == 0


@pytest.mark.slow
def test_the_line_of_the_teacher_names_its_cache(tmp_path, distilled, teacher_run):
    directory, flags = tmp_path / "cache", [*distilled, "--data.views=2", "--train.max_steps=1"]
    stored = ["--teacher.outputs=cached", f"--teacher.cache.dir={directory}"]
    build = header(cache("build", *flags, *stored))
    assert list(build) == ["cache", *NAMES[1:4], *NAMES[5:9], "teacher", "layers"]
    assert build["layers"] == "mse: [layer1, layer2]"
    assert build["cache"] == str(directory) and build["views"].endswith(
        "random_horizontal_flip(p=0.5); 2 of each training sample"
    )
    assert build["teacher"].startswith(f"{teacher_run}, import:tests.support.models:teacher, ")
    for outputs, expected in (("cached", f"cached in {directory}"), ("mixed", f"logits cached in {directory}, features live")):
        found = header(train(tmp_path / outputs, *flags, *stored, f"--teacher.outputs={outputs}"))
        assert found["teacher"] == f"{teacher_run}, {expected}, {accuracy_of(teacher_run)}"


def test_a_teacher_that_is_not_at_hand_has_its_cache_alone():
    teacher = TeacherConfig(outputs="cached", cache=CacheConfig(dir="caches/r50"))
    assert described_teacher(teacher, 0.5) == "not at hand, cached in caches/r50, accuracy 50.00 % on the test samples"
    assert described_teacher(teacher, None) == "not at hand, cached in caches/r50"


def test_a_teacher_without_a_weight_is_reported_below_the_header(tmp_path, teacher_run):
    text = train(tmp_path / "run", f"--teacher.run={teacher_run}", "--distill.alpha=0", "--train.max_steps=1")
    assert text.index("teacher  ") < text.index("distill.alpha: 0 and no distill.features") < text.index("step 1/1")


def test_an_evaluation_prints_its_header_on_stderr(teacher_run):
    """The output on stdout is one line of JSON for other programs."""
    done = launching.run("evaluate", teacher_run, "--split=val")
    assert len(done.stdout.splitlines()) == 1
    found = header(done.stderr)
    assert list(found) == [*NAMES[:7], "teacher"]
    assert found["samples"] == "32 val" and found["model"].startswith("import:tests.support.models:teacher, ")


@pytest.mark.slow
@pytest.mark.proof
def test_the_main_process_of_several_prints_the_header_once(tmp_path):
    done = launching.train(tmp_path / "run", "--train.max_steps=1", processes=2)
    assert header(done.stdout)["processes"] == "2"
    for name in NAMES:
        assert len(re.findall(rf"^{name} ", done.stdout, re.MULTILINE)) == 1


def test_the_page_shows_the_lines_of_a_real_start(tmp_path):
    (picture,) = re.findall(r"```text\n(run .*?)```", PAGE, re.DOTALL)
    assert list(header(picture)) == list(header(train(tmp_path / "run", "--train.max_steps=1"))) == NAMES
    table = PAGE.partition("| line | content |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == NAMES
