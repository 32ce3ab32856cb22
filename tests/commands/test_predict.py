"""Predictions for files: equal to those of an evaluation, from a copied folder, another directory and a fresh process."""

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import kd_accel as kd
from tests.support import in_process, launching
from tests.support.image_files import encoded
from tests.support.in_process import say

CLASSES = ("cat", "dog", "fox", "owl", "pig", "rat")


def odd_photos(generator, color):
    """Return {name: bytes} of files in which each part of the preprocessing changes the pixels."""
    size = generator.integers(17, 60, 2)
    pixels = (generator.integers(-60, 60, (*size, 3)) + color).clip(0, 255).astype(np.uint8)
    pixels[: size[0] // 3] = 255 - pixels[: size[0] // 3]
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    ink = image.copy()
    ink.putalpha(Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)))
    return {
        "0.png": encoded(image),
        "ink.png": encoded(ink),
        "turned.jpg": encoded(image, "JPEG", exif=exif),
        "gray.png": encoded(image.convert("L")),
        "printed.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "large.jpg": encoded(image.resize((150, 90)), "JPEG"),
        "deep.png": encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 16)),
    }


def write_odd_photos(root):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for file, content in odd_photos(generator, 40 * label + 20).items():
                (root / split / name / file).write_bytes(content)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with photos, a teacher, and a student with another preprocessing than the default."""
    directory = tmp_path_factory.mktemp("project")
    write_odd_photos(directory / "photos")
    flags = [
        f"--data.source=imagefolder:{directory / 'photos'}",
        "--data.image_size=16",
        "--data.background=white",
        "--data.pixel_range=[0, 4095]",
        "--data.crop_pct=0.8",
        "--train.batch_size=4",
        "--train.epochs=2",
    ]
    in_process.train(directory / "teacher", *flags, "--model.arch=import:tests.support.models:teacher")
    own = [f"--teacher.run={directory / 'teacher'}", "--teacher.min_accuracy=null"]
    in_process.train(directory / "student", *flags, *own, "--model.arch=import:tests.support.models:student_with_everything")
    return directory


@pytest.fixture(scope="module")
def evaluated(project):
    """Return the metrics of `evaluate` on the test split, and the rows of its Parquet file."""
    text = say("evaluate", project / "student", "--out", project / "evaluated/student.parquet")
    return json.loads(text.splitlines()[-1]), pq.read_table(project / "evaluated/student.parquet")


@pytest.fixture
def copied(project, tmp_path, monkeypatch):
    """Return a copy of the model's two files, next to which the working directory is."""
    (tmp_path / "copied").mkdir()
    for name in ("model.safetensors", "model.json"):
        shutil.copy(project / "student" / name, tmp_path / "copied")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "copied"


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_the_file_of_an_evaluation_has_each_sample_once_with_its_figures(project, evaluated):
    metrics, table = evaluated
    rows = table.to_pylist()
    assert list(rows[0]) == ["run", "index", "path", "label", "prediction", "score", "probabilities", "teacher_prediction"]
    assert [row["index"] for row in rows] == list(range(len(CLASSES) * 7)) and metrics["samples"] == len(rows)
    assert [row["path"] for row in rows] == sorted(map(str, (project / "photos/test").rglob("*.*g")))
    assert [row["label"] for row in rows] == [row["path"].split("/")[-2] for row in rows]
    assert json.loads(table.schema.metadata[b"label_names"]) == {str(project / "student"): list(CLASSES)}
    for row in rows:
        assert row["prediction"] == CLASSES[int(np.argmax(row["probabilities"]))] and row["score"] == max(row["probabilities"])
    correct = [row["prediction"] == row["label"] for row in rows]
    assert metrics["accuracy"] == sum(correct) / len(rows) == pytest.approx(metrics["balanced_accuracy"])
    assert metrics["agreement"] == sum(row["prediction"] == row["teacher_prediction"] for row in rows) / len(rows) < 1
    top5 = [CLASSES.index(row["label"]) in np.argsort(row["probabilities"])[-5:] for row in rows]
    assert metrics["top5_accuracy"] == sum(top5) / len(rows)
    of_cats = [right for right, row in zip(correct, rows, strict=True) if row["label"] == "cat"]
    assert metrics["per_class"]["cat"] == {"samples": 7, "accuracy": sum(of_cats) / 7}
    assert list(metrics)[:6] == ["run", "split", "samples", "loss", "accuracy", "agreement"]


def check_equal(predicted, rows):
    """Check lines or rows of `predict` against rows of `evaluate`, bit for bit."""
    assert [line["file"] for line in predicted] == [row["path"] for row in rows]
    assert [line["label"] for line in predicted] == [row["prediction"] for row in rows]
    assert [np.float32(line["score"]) for line in predicted] == [np.float32(row["score"]) for row in rows]


def test_predictions_equal_the_evaluation(project, copied, evaluated):
    """All files are one batch, as in the evaluation; kernels depend on the size of a batch."""
    rows = evaluated[1].to_pylist()
    text = say("predict", copied, *[row["path"] for row in rows], "--out=out.parquet", "--top_k=2")
    check_equal(lines(text), rows)
    table = pq.read_table("out.parquet")
    check_equal(table.to_pylist(), rows)
    assert table["probabilities"].to_pylist() == [row["probabilities"] for row in rows]
    assert json.loads(table.schema.metadata[b"label_names"]) == {str(copied): list(CLASSES)}
    for line, row in zip(lines(text), rows, strict=True):
        best = sorted(zip(row["probabilities"], CLASSES, strict=True), reverse=True)[:2]
        assert line["top"] == [{"label": label, "score": score} for score, label in best]
        assert line["top"][0] == {"label": line["label"], "score": line["score"]}
    small = lines(say("predict", copied, project / "photos/test", "--batch_size=5"))
    assert [line["label"] for line in small] == [row["prediction"] for row in rows]
    assert [line["score"] for line in small] == pytest.approx([row["score"] for row in rows], abs=1e-6)


def test_predictions_in_python_equal_the_evaluation(copied, evaluated):
    rows = evaluated[1].to_pylist()
    model, paths = kd.load_model("copied"), [row["path"] for row in rows]
    predicted = model.predict(paths)
    assert [type(module) for module in model.network.modules()].count(torch.nn.Conv2d) == 2
    assert [prediction.label for prediction in predicted] == [row["prediction"] for row in rows]
    kd.use_cpu_kernels(model.network, torch.device("cpu"))
    for plain, fast, row in zip(predicted, model.predict(paths), rows, strict=True):
        assert list(plain.probabilities.values()) == pytest.approx(row["probabilities"], abs=1e-6)
        assert list(fast.probabilities.values()) == row["probabilities"]


def test_a_range_of_values_that_the_run_does_not_have_is_not_guessed(project, copied):
    content = json.loads((copied / "model.json").read_text())
    (copied / "model.json").write_text(json.dumps({**content, "pixel_range": None}))
    deep = project / "photos/test/cat/deep.png"
    with pytest.raises(
        ValueError, match="deep.png .it has 16-bit values .* neither does model.json: the run has no data.pixel_r"
    ):
        kd.load_model(copied).predict([deep])
    assert "does not define black and white, and neither does model.json" in say("predict", copied, deep, code=2)


def test_each_part_of_the_preprocessing_matters(copied, evaluated):
    rows = evaluated[1].to_pylist()
    content = json.loads((copied / "model.json").read_text())
    for part in ({"background": "black"}, {"crop_pct": 1.0}, {"pixel_range": [0, 65535]}, {"mean": [0.1] * 3}):
        (copied / "model.json").write_text(json.dumps({**content, **part}))
        predicted = kd.load_model(copied).predict([row["path"] for row in rows])
        differing = [abs(own.score - row["score"]) > 1e-4 for own, row in zip(predicted, rows, strict=True)]
        assert any(differing), part


@pytest.mark.slow
def test_a_fresh_process_predicts_the_same(project, copied, evaluated, tmp_path):
    argv = ["-m", "kd_accel", "predict", "--allow_import", "copied", project / "photos/test", "--out=out.parquet"]
    done = launching.python(*argv, cwd=tmp_path)
    rows = evaluated[1].to_pylist()
    check_equal(lines(done.stdout), rows)
    assert pq.read_table(tmp_path / "out.parquet")["probabilities"].to_pylist() == [row["probabilities"] for row in rows]


def test_unreadable_files_are_named_after_all_others_are_predicted(project, copied, tmp_path):
    (tmp_path / "broken.png").write_bytes((project / "photos/test/cat/0.png").read_bytes()[:90])
    (tmp_path / "notes.txt").write_text("x")
    first, last = project / "photos/test/cat/0.png", project / "photos/test/dog/0.png"
    text = say("predict", copied, first, "broken.png", "absent.png", "notes.txt", last, "--out=out.parquet", code=2)
    assert [line["file"] for line in lines(text)] == [str(first), str(last)] == pq.read_table("out.parquet")["file"].to_pylist()
    assert "predict: cannot read absent.png (No such file or directory); check the path" in text
    assert "predict: cannot decode notes.txt (not an image file of a supported format)" in text
    last_line = "kd-accel: predict: 3 of 5 files cannot be read as images and have no prediction ('broken.png', 'absent.png', "
    assert text.splitlines()[-1].startswith(last_line)
    assert lines(say("predict", copied, "absent.png", code=2)) == []


def test_each_line_has_its_row_in_the_file(copied, tmp_path):
    """A file that is named twice, and one whose name is not UTF-8."""
    odd = os.fsdecode(b"caf\xe9.png")
    for name in ("a.png", odd):
        Image.new("RGB", (9, 9)).save(tmp_path / name, "PNG")
    text = say("predict", "copied", "a.png", odd, "a.png", "--out=out.parquet")
    assert [line["file"] for line in lines(text)] == ["a.png", odd, "a.png"]
    assert pq.read_table("out.parquet")["file"].to_pylist() == ["a.png", "caf\\xe9.png", "a.png"]


def test_files_of_a_directory_that_are_left_out_are_counted(copied, tmp_path):
    (tmp_path / "new/deep").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "new/deep/a.png")
    (tmp_path / "new/notes.txt").write_text("x")
    text = say("predict", "copied", "new")
    assert [line["file"] for line in lines(text)] == ["new/deep/a.png"] and list(lines(text)[0]) == ["file", "label", "score"]
    assert "predict: new: 1 file left out (files of type .txt)" in text
    (tmp_path / "new/deep/a.png").unlink()
    assert "predict: new has no images; 1 file left out" in say("predict", "copied", "new", code=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_k=7"], "--top_k: 7 must be from 1 to 6, the number of classes of the model"),
        (["--top_k=0"], "--top_k: 0 must be from 1 to 6"),
        (["--top_k=many"], "--top_k: invalid int value: 'many'"),
        (["--batch_size=0"], "--batch_size: 0 must be at least 1"),
        (["--out=out.csv"], "--out: out.csv is not a valid name, because predictions are a Parquet file"),
        (["--topk=3"], "--topk: no such option; did you mean --top_k?"),
    ],
)
def test_wrong_arguments_are_refused(copied, flags, message):
    text = say("predict", copied, "a.png", *flags, code=2)
    assert message in text and lines(text) == []


def test_a_directory_without_a_run_is_refused(tmp_path):
    assert "no finished run in this directory" in say("predict", tmp_path, "a.png", code=2)


def test_several_runs_are_evaluated_in_turn(project, tmp_path):
    out = tmp_path / "both.parquet"
    names = [str(project / "student"), str(project / "teacher")]
    text = say("evaluate", *names, "--split=val", "--out", out)
    found, table = lines(text), pq.read_table(out)
    assert [line["run"] for line in found] == names and [line["split"] for line in found] == ["val", "val"]
    assert "agreement" in found[0] and "agreement" not in found[1]
    for line in found:
        alone = lines(say("evaluate", line["run"], "--split=val"))
        assert alone == [line]
        rows = [row for row in table.to_pylist() if row["run"] == line["run"]]
        assert len(rows) == line["samples"]
        assert sum(row["label"] == row["prediction"] for row in rows) == round(line["accuracy"] * len(rows))
        assert all(
            ("/train/" in row["path"]) and (row["teacher_prediction"] is None) == ("agreement" not in line) for row in rows
        )


def test_a_wrong_file_is_refused_before_the_evaluation(project, tmp_path):
    assert lines(say("evaluate", project / "student", "--out=out.csv", code=2)) == []
    assert "absent/config.yaml: is missing" in say("evaluate", project / "student", tmp_path / "absent", code=2)
