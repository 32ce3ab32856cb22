"""The report: table and figures from run directories and a bench file, with reference figures for CIFAR-10 only."""

import json
import sys

import pytest
from PIL import Image

from kd_accel.bench.provenance import model_digest
from kd_accel.errors import UserError
from kd_accel.report.plots import plot_accuracy_against_latency, plot_learning_curves
from kd_accel.report.tables import CIFAR10_CLASSES, write_report
from tests.support.launching import run

RESNET50, RESNET18 = "torchvision/resnet50", "torchvision/resnet18"
HEADER = ["Model", "Architecture", "Accuracy (%)", "Parameters (M)", "MACs (M)", "Latency (ms)"]


def finished_run(root, name, **changes):
    """Create the directory of a finished run, without the weights."""
    directory = root / name
    directory.mkdir()
    summary = {
        "name": name,
        "role": "student",
        "arch": RESNET18,
        "accuracy": 0.7506,
        "parameters": 11_181_642,
        "is_scheduled": False,
        "data": {"label_names": ["a", "b"]},
    }
    (directory / "summary.json").write_text(json.dumps({**summary, **changes}))
    lines = [{"step": step, "epoch": 0, "split": "train", "loss": 2.0 / step} for step in range(1, 5)]
    lines += [{"step": 4, "epoch": epoch, "split": "val", "loss": 1.0, "accuracy": 0.2 * epoch} for epoch in (1, 2)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def bench_file(root, *runs):
    """Create a bench file of runs, each (directory, median in milliseconds)."""
    models = [
        {
            "name": str(directory),
            "macs": 37_017_600,
            "latency": [{"batch_size": 32, "median_ms": 99.0}, {"batch_size": 1, "median_ms": median_ms}],
        }
        for directory, median_ms in runs
    ]
    path = root / "bench.json"
    path.write_text(json.dumps({"device": "cpu", "models": models}))
    return path


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_without_reference_for_other_data_than_cifar10(tmp_path):
    runs = [
        finished_run(tmp_path, "large", role="teacher", arch=RESNET50, accuracy=0.99444, parameters=23_528_522),
        finished_run(tmp_path, "small", role="distilled"),
    ]
    table = write_report(runs, out=tmp_path / "out", bench_file=bench_file(tmp_path, (runs[0], 12.345), (runs[1], 4.5)))
    assert cells(table) == [
        HEADER,
        ["---", "---", "---:", "---:", "---:", "---:"],
        ["large (teacher)", RESNET50, "99.44", "23.53", "37.0", "12.35"],
        ["small (distilled)", RESNET18, "75.06", "11.18", "37.0", "4.50"],
    ]
    assert (tmp_path / "out/results.md").read_text() == table + "\n"
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert [list(row) for row in rows] == [["name", "role", "arch", "accuracy", "parameters", "macs", "latency_ms"]] * 2
    assert list(rows[0].values()) == ["large", "teacher", RESNET50, 0.99444, 23_528_522, 37_017_600, 12.345]
    for name in ("learning_curves.png", "accuracy_latency.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.format == "PNG" and min(image.size) >= 400


def test_column_for_cuda_graphs_if_measured(tmp_path):
    runs = [finished_run(tmp_path, "large"), finished_run(tmp_path, "small")]
    path = bench_file(tmp_path, (runs[0], 3.0), (runs[1], 2.0))
    content = json.loads(path.read_text())
    content["models"][0]["latency"][1]["graph_median_ms"] = 0.5
    content["models"][1]["latency"][1]["graph_median_ms"] = None
    path.write_text(json.dumps(content))
    header, _, *rows = cells(write_report(runs, out=tmp_path / "out", bench_file=path))
    assert header == [*HEADER, "CUDA graph (ms)"]
    assert [row[5:] for row in rows] == [["3.00", "0.50"], ["2.00", ""]]
    found = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert found[0]["graph_latency_ms"] == 0.5 and "graph_latency_ms" not in found[1]


def test_reference_figures_for_cifar10_only(tmp_path):
    cifar10 = {"data": {"label_names": CIFAR10_CLASSES}}
    runs = [
        finished_run(tmp_path, "t", role="teacher", arch=RESNET50, **cifar10),
        finished_run(tmp_path, "s", **cifar10),
        finished_run(tmp_path, "f", role="distilled", **cifar10),
        finished_run(tmp_path, "v", role="distilled", is_scheduled=True, **cifar10),
        finished_run(tmp_path, "other_arch", role="distilled", arch="timm/vit", **cifar10),
        finished_run(tmp_path, "other_data"),
    ]
    header, _, *rows = cells(write_report(runs, out=tmp_path / "out"))
    assert header == [*HEADER, "Reference: accuracy / parameters / latency"]
    assert [row[6] for row in rows] == [
        "85.11 / 23.5 / 8.72",
        "75.06 / 11.18 / 4.70",
        "76.8 / 11.18 / 4.10",
        "78.6 / 11.18 / 3.90",
        "",
        "",
    ]


def test_without_bench_file_latency_is_empty_and_old_figures_are_removed(tmp_path):
    directory = finished_run(tmp_path, "r")
    write_report([directory], out=tmp_path / "out", bench_file=bench_file(tmp_path, (directory, 1.0)))
    assert (tmp_path / "out/accuracy_latency.png").exists()
    table = write_report([directory], out=tmp_path / "out")
    assert cells(table)[2][4:] == ["", ""]
    (row,) = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert row["macs"] is None and row["latency_ms"] is None
    assert not (tmp_path / "out/accuracy_latency.png").exists()
    assert (tmp_path / "out/learning_curves.png").exists()


def test_without_batch_size_1_latency_is_empty(tmp_path):
    directory = finished_run(tmp_path, "r")
    bench = tmp_path / "bench.json"
    models = [{"name": str(directory), "macs": 1, "latency": [{"batch_size": 8, "median_ms": 3.0}]}]
    bench.write_text(json.dumps({"models": models}))
    assert cells(write_report([directory], out=tmp_path / "out", bench_file=bench))[2][5] == ""


def test_without_matplotlib_the_table_is_written_and_old_figures_are_removed(tmp_path, monkeypatch, capsys):
    directory = finished_run(tmp_path, "r")
    bench = bench_file(tmp_path, (directory, 1.0))
    table = write_report([directory], out=tmp_path / "out", bench_file=bench)
    assert capsys.readouterr().out == ""
    for name in [name for name in sys.modules if name == "kd_accel.report.plots" or name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report([directory], out=tmp_path / "out", bench_file=bench) == table
    assert capsys.readouterr().out == "no figures are drawn, because matplotlib is not installed; pip install matplotlib\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.md", "results.json"}


def pixels(path):
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_runs_with_the_same_name_have_separate_curves(tmp_path):
    lines = [
        {"step": step, "epoch": step, "split": split, "loss": 1.0, "accuracy": 0.5}
        for split in ("train", "val")
        for step in (1, 2)
    ]
    other = [{**line, "loss": 0.1, "accuracy": 0.9} for line in lines]
    plot_learning_curves([("a", lines), ("a", other)], tmp_path / "two.png")
    plot_learning_curves([("a", lines), ("a", lines)], tmp_path / "same.png")
    assert pixels(tmp_path / "two.png") != pixels(tmp_path / "same.png")


def test_run_without_validation_is_plotted(tmp_path):
    plot_learning_curves([("a", [{"step": 1, "epoch": 0, "split": "train", "loss": 1.0}])], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0


def blue_pixels(path):
    """Count the pixels in the color of the first model."""
    with Image.open(path) as image:
        counts = {color: count for count, color in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    return counts[31, 119, 180]


def test_overlapping_markers_are_both_visible(tmp_path):
    plot_accuracy_against_latency([("a", 1.0, 0.9), ("b", 1.0, 0.9)], tmp_path / "together.png")
    plot_accuracy_against_latency([("a", 1.0, 0.9), ("b", 0.1, 0.89)], tmp_path / "apart.png")
    # Half of the pixels are in the legend, so that a hidden marker would leave about half.
    assert blue_pixels(tmp_path / "together.png") > 0.75 * blue_pixels(tmp_path / "apart.png")


def test_unfinished_or_damaged_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(UserError, match="summary.json: cannot be read .*train it first"):
            write_report([tmp_path / name], out=tmp_path / "out")
    damages = {
        "{": "summary.json: is damaged .not valid JSON.",
        "[]": "summary.json: is damaged .not a JSON object.",
        '{"name": "x"}': "summary.json: is damaged .'role' is missing or unknown.; train the run again",
    }
    directory = finished_run(tmp_path, "r")
    for text, message in damages.items():
        (directory / "summary.json").write_text(text)
        with pytest.raises(UserError, match=message):
            write_report([directory], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_summary_with_invalid_numbers_is_refused(tmp_path):
    with pytest.raises(UserError, match="summary.json: is damaged .ValueError: could not convert string to float: 'high'"):
        write_report([finished_run(tmp_path, "r", accuracy="high")], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{\n", "a line is not valid JSON"), ("1\n", "a line without step"), ('{"step": 1}\n', "a line without step")],
)
def test_damaged_metrics_are_refused(tmp_path, text, reason):
    directory = finished_run(tmp_path, "r")
    (directory / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"metrics.jsonl: is damaged .{reason}"):
        write_report([directory], out=tmp_path / "out")


def test_metrics_beyond_the_size_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_accel.report.tables._MAX_CURVE_BYTES", 2**20)
    directory = finished_run(tmp_path, "r")
    (directory / "metrics.jsonl").write_text(" " * 2**20 + "\n")
    with pytest.raises(UserError, match="metrics.jsonl: exceeds the limit of 1 MiB; .* larger train.log_every_steps"):
        write_report([directory], out=tmp_path / "out")


def test_missing_metrics_are_refused(tmp_path):
    directory = finished_run(tmp_path, "r")
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read"):
        write_report([directory], out=tmp_path / "out")


def test_incomplete_or_damaged_bench_file_is_refused(tmp_path):
    first, second = finished_run(tmp_path, "first"), finished_run(tmp_path, "second")
    with pytest.raises(
        UserError,
        match="--bench .*: lacks the current model of .*second; .*kd-accel bench .*first .*second --out .*bench.json$",
    ):
        write_report([first, second], out=tmp_path / "out", bench_file=bench_file(tmp_path, (first, 1.0)))
    with pytest.raises(UserError, match="nowhere.json: cannot be read .*kd-accel bench"):
        write_report([first], out=tmp_path / "out", bench_file=tmp_path / "nowhere.json")
    for text in ('{"rows": []}', '{"models": [{}]}', '{"models": 3}'):
        (tmp_path / "bench.json").write_text(text)
        with pytest.raises(UserError, match="is not a file of kd-accel bench"):
            write_report([first], out=tmp_path / "out", bench_file=tmp_path / "bench.json")
    (tmp_path / "bench.json").write_text(json.dumps({"models": [{"name": str(first), "macs": "many", "latency": []}]}))
    with pytest.raises(UserError, match="--bench: the entry of .*first is damaged .*'many'.*; measure it again"):
        write_report([first], out=tmp_path / "out", bench_file=tmp_path / "bench.json")


def test_figures_of_an_earlier_model_of_the_run_are_refused(tmp_path):
    directory = finished_run(tmp_path, "r")
    for name in ("model.json", "model.safetensors"):
        (directory / name).write_text("old")
    bench = bench_file(tmp_path, (directory, 1.0))
    content = json.loads(bench.read_text())
    content["models"][0]["digest"] = model_digest(directory)
    bench.write_text(json.dumps(content))
    write_report([directory], out=tmp_path / "out", bench_file=bench)
    (directory / "model.safetensors").write_text("new")
    with pytest.raises(UserError, match="--bench .*: lacks the current model of .*r; measure"):
        write_report([directory], out=tmp_path / "out", bench_file=bench)


def test_unwritable_directory_is_refused(tmp_path):
    directory = finished_run(tmp_path, "r")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: cannot write to .*file"):
        write_report([directory], out=tmp_path / "file")


def test_command_line(tmp_path):
    directory = finished_run(tmp_path, "r")
    done = run("report", directory, f"--out={tmp_path / 'out'}", f"--bench={bench_file(tmp_path, (directory, 2.5))}")
    assert f"| r (student) | {RESNET18} | 75.06 | 11.18 | 37.0 | 2.50 |" in done.stdout
    assert "train it first" in run("report", tmp_path / "nowhere", f"--out={tmp_path / 'out'}", code=2).stderr
