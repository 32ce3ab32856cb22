"""The report: table, pictures and page from run directories and a bench file, with reference figures for CIFAR-10 only."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from kd_accel.bench.provenance import model_digest
from kd_accel.errors import UserError
from kd_accel.report.content import Figures
from kd_accel.report.output import read_report, write_report
from kd_accel.report.page import page
from kd_accel.report.tables import CIFAR10_CLASSES, results_table
from tests.report.runs import (
    RESNET18,
    RESNET50,
    bench_file,
    finished_run,
    unfinished_run,
    write_predictions,
    write_settings,
)
from tests.support.launching import run

HEADER = ["Model", "Architecture", "Accuracy (%)", "Parameters (M)", "MACs (M)", "Latency (ms)", "Throughput (images/s)"]
COMPARED = ["Model", "Architecture", "Accuracy (%)", "Gap to teacher (points)", "Parameters (M)", "Compression"]
KEYS = ["name", "role", "arch", "accuracy", "parameters", "macs", "latency_ms"]
FILES = {"results.md", "results.json", "index.html"}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def table_of(runs, bench_file=None):
    """Return the cells of the table, without the pictures of a complete report."""
    return cells(results_table(read_report(runs, bench_file).results))


def rows_of(runs, bench_file=None):
    return [result.row.figures() for result in read_report(runs, bench_file).results]


def test_table_without_reference_for_other_data_than_cifar10(tmp_path):
    runs = [
        finished_run(tmp_path, "large", role="teacher", arch=RESNET50, accuracy=0.99444, parameters=23_528_522),
        finished_run(tmp_path, "small", role="distilled"),
    ]
    table = write_report(runs, out=tmp_path / "out", bench_file=bench_file(tmp_path, (runs[0], 12.345), (runs[1], 4.5)))
    assert cells(table) == [
        [*COMPARED, *HEADER[4:]],
        ["---", "---", *["---:"] * 7],
        ["large (teacher)", RESNET50, "99.44", "", "23.53", "", "37.0", "12.35", "323"],
        ["small (distilled)", RESNET18, "75.06", "24.38", "11.18", "2.1×", "37.0", "4.50", "323"],
    ]
    assert (tmp_path / "out/results.md").read_text() == table + "\n"
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    throughput = ["images_per_second", "throughput_batch_size"]
    assert list(rows[0]) == [*KEYS, *throughput, "run"]
    assert list(rows[1]) == [*KEYS, *throughput, "gap_to_teacher", "compression", "run"]
    assert list(rows[0].values())[:7] == ["large", "teacher", RESNET50, 0.99444, 23_528_522, 37_017_600, 12.345]
    assert rows[1]["gap_to_teacher"] == pytest.approx(0.24384) and rows[1]["run"] == str(runs[1])
    for name in ("learning_curves.png", "accuracy_latency.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.format == "PNG" and min(image.size) >= 400 and image.info["dpi"][0] > 150


def test_column_for_cuda_graphs_if_measured(tmp_path):
    runs = [finished_run(tmp_path, "large"), finished_run(tmp_path, "small")]
    path = bench_file(tmp_path, (runs[0], 3.0), (runs[1], 2.0))
    content = json.loads(path.read_text())
    content["models"][0]["latency"][1]["graph_median_ms"] = 0.5
    content["models"][1]["latency"][1]["graph_median_ms"] = None
    path.write_text(json.dumps(content))
    header, _, *rows = table_of(runs, path)
    assert header == [*HEADER[:6], "CUDA graph (ms)", HEADER[6]]
    assert [row[5:7] for row in rows] == [["3.00", "0.50"], ["2.00", ""]]
    found = rows_of(runs, path)
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
    header, _, *rows = table_of(runs)
    assert header == [*COMPARED, *HEADER[4:6], "Reference: accuracy / parameters / latency"]
    assert [row[-1] for row in rows] == [
        "85.11 / 23.5 / 8.72",
        "75.06 / 11.18 / 4.70",
        "76.8 / 11.18 / 4.10",
        "78.6 / 11.18 / 3.90",
        "",
        "",
    ]


def test_without_bench_file_latency_is_empty_and_old_figures_are_removed(tmp_path):
    directory = finished_run(tmp_path, "r")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/accuracy_latency.png").write_text("of an earlier report")
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
    assert table_of([directory], bench)[2][5:] == ["", "2667"]


def test_without_matplotlib_the_table_is_written_and_old_figures_are_removed(tmp_path, monkeypatch, capsys):
    directory = finished_run(tmp_path, "r")
    bench = bench_file(tmp_path, (directory, 1.0))
    (tmp_path / "out").mkdir()
    for name in ("learning_curves.png", "accuracy_latency.png"):
        (tmp_path / "out" / name).write_text("of an earlier report")
    for name in [name for name in sys.modules if name == "kd_accel.report.plots" or name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cells(write_report([directory], out=tmp_path / "out", bench_file=bench)) == table_of([directory], bench)
    assert capsys.readouterr().out == "no figures are drawn, because matplotlib is not installed; pip install matplotlib\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "matplotlib was not installed" in (tmp_path / "out/index.html").read_text()


def test_an_unfinished_run_has_a_row_and_its_curves(tmp_path):
    teacher = finished_run(tmp_path, "large", role="teacher", parameters=4)
    started = unfinished_run(tmp_path, "new", teacher={"run": "x"})
    table = write_report([teacher, started], out=tmp_path / "out", bench_file=bench_file(tmp_path, (teacher, 2.0)))
    assert cells(table)[3] == ["new (distilled, unfinished, step 4 of 6)", RESNET18, *[""] * 5]
    row = json.loads((tmp_path / "out/results.json").read_text())["rows"][1]
    assert {key: row[key] for key in KEYS[3:]} == dict.fromkeys(KEYS[3:]) and (row["step"], row["steps"]) == (4, 6)
    page = (tmp_path / "out/index.html").read_text()
    assert "unfinished, step 4 of 6" in page and "2, 1 of them unfinished" in page
    assert page.count("stroke: var(--run1)") >= 2


def test_seeds_have_a_line_with_mean_and_deviation(tmp_path):
    runs = [finished_run(tmp_path, f"small-seed{seed}", accuracy=0.7 + 0.02 * seed) for seed in (0, 1)]
    runs.append(finished_run(tmp_path, "other"))
    for seed, directory in enumerate(runs):
        write_settings(directory, seed=seed, optim={"lr": 0.1 if seed < 2 else 0.2})
    table = table_of(runs)
    names = [row[0] for row in table[2:]]
    mean = "**small**, mean ± standard deviation (n = 2)"
    assert names == ["small-seed0 (student)", "small-seed1 (student)", mean, "other (student)"]
    assert table[4][2:4] == ["71.00 ± 1.41", "11.18"]
    assert [row["seed"] for row in rows_of(runs)] == [0, 1, 2]


def test_columns_of_predictions_and_of_the_best_epoch(tmp_path):
    names = {"data": {"label_names": list("abcdef")}}
    run = finished_run(tmp_path, "r", agreement=0.5, accuracy_best=0.8, best_epoch=2, teacher_accuracy=0.9, **names)
    write_predictions(run, labels=[0, 1, 2, -1], predicted=[0, 0, 0, 0], ranks=[0, 4, 5, 9])
    header, _, row = table_of([run])
    shown = dict(zip(header, row, strict=True))
    assert (shown["Top-5 (%)"], shown["Agreement (%)"], shown["Best epoch (%)"]) == ("66.67", "50.00", "80.00")
    assert shown["Gap to teacher (points)"] == "14.94" and "Compression" not in shown


def test_names_do_not_break_the_table(tmp_path):
    run = finished_run(tmp_path, "r", name="a|b\nc", arch="x|y")
    assert "| a\\|b c (student) | x\\|y | 75.06 |" in results_table(read_report([run], None).results)


def test_directory_without_a_run_and_damaged_run_are_refused(tmp_path):
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
    monkeypatch.setattr("kd_accel.report.run_files._MAX_CURVE_BYTES", 2**20)
    directory = finished_run(tmp_path, "r")
    (directory / "metrics.jsonl").write_text(" " * 2**20 + "\n")
    with pytest.raises(UserError, match="metrics.jsonl: exceeds the limit of 1 MiB; .* larger train.log_every_steps"):
        write_report([directory], out=tmp_path / "out")


def test_missing_metrics_are_refused(tmp_path):
    directory = finished_run(tmp_path, "r")
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read"):
        write_report([directory], out=tmp_path / "out")


def test_a_benchmark_that_was_stopped_leaves_cells_empty(tmp_path):
    runs = [finished_run(tmp_path, name) for name in ("first", "second", "third")]
    path = bench_file(tmp_path, (runs[0], 2.0), (runs[1], 3.0))
    content = json.loads(path.read_text())
    content["models"][1]["latency"] = []
    content |= {"complete": False, "stopped_by": "SIGINT", "not_measured": [{"name": str(runs[2]), "batch_sizes": [1]}]}
    path.write_text(json.dumps(content))
    assert [row[4:] for row in table_of(runs, path)[2:]] == [["37.0", "2.00", "323"], ["37.0", "", ""], ["", "", ""]]


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
    read_report([directory], bench)
    (directory / "model.safetensors").write_text("new")
    with pytest.raises(UserError, match="--bench .*: lacks the current model of .*r; measure"):
        read_report([directory], bench)


def test_unwritable_directory_is_refused(tmp_path):
    directory = finished_run(tmp_path, "r")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: cannot write to .*file"):
        write_report([directory], out=tmp_path / "file")


def test_command_line(tmp_path):
    directory = finished_run(tmp_path, "r")
    done = run("report", directory, f"--out={tmp_path / 'out'}", f"--bench={bench_file(tmp_path, (directory, 2.5))}")
    assert f"| r (student) | {RESNET18} | 75.06 | 11.18 | 37.0 | 2.50 | 323 |" in done.stdout
    assert "train it first" in run("report", tmp_path / "nowhere", f"--out={tmp_path / 'out'}", code=2).stderr


def test_a_repeated_run_has_one_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        finished_run(tmp_path, name)
    found = [row["run"] for row in rows_of([Path("b"), Path("a"), tmp_path / "a", tmp_path / "b", Path("b")])]
    assert found == ["b", "a"]


def test_a_teacher_of_other_classes_or_test_samples_is_not_compared(tmp_path):
    finished_run(tmp_path, "large", role="teacher", arch=RESNET50, accuracy=0.95, parameters=23_000_000)
    others = {"classes": {"label_names": ["x", "y"]}, "samples": {"label_names": ["a", "b"], "test": {"samples": 9}}}
    runs = [tmp_path / "large", *(finished_run(tmp_path, name, data=data) for name, data in others.items())]
    assert [set(row) & {"gap_to_teacher", "compression"} for row in rows_of(runs)] == [set()] * 3
    other = finished_run(tmp_path, "pixels", data={"label_names": ["a", "b"], "test": {"digest": "of other pixels"}})
    assert "compression" in rows_of([*runs, other])[3]
    assert rows_of([*runs, finished_run(tmp_path, "small")])[3]["gap_to_teacher"] == pytest.approx(0.1994)


def test_runs_of_the_same_name_are_told_apart_in_the_table(tmp_path):
    runs = [finished_run(tmp_path, name, name="net", role="distilled", accuracy=0.8) for name in ("t1", "t4")]
    for directory, temperature in zip(runs, (1, 4), strict=True):
        write_settings(directory, distill={"temperature": temperature})
    plain = finished_run(tmp_path, "plain")
    write_settings(plain)
    text = write_report([*runs, plain], out=tmp_path / "out", say=print)
    for directory in runs:
        assert f"| net ({directory}) (distilled) |" in text and f"net ({directory}) against plain: +4.94 points" in text


def test_a_very_large_loss_does_not_damage_a_run(tmp_path):
    run = unfinished_run(tmp_path, "a")
    lines = [json.dumps({"step": 4, "epoch": 0, "split": "train", "loss": loss}) + "\n" for loss in (3e15, 3e38)]
    (run / "metrics.jsonl").write_text("".join(lines))
    write_report([run], out=tmp_path / "out", say=print)
    assert "unfinished, step 4" in (tmp_path / "out/results.md").read_text()
    (run / "metrics.jsonl").write_text(lines[0].replace("3000000000000000.0", "1e39"))
    with pytest.raises(UserError, match="is damaged"):
        read_report([run], None)


def test_runs_that_share_figures_are_in_the_table_of_latencies(tmp_path):
    card = {"arch": RESNET18, "stem": "imagenet", "arch_args": {}, "image_size": 32, "label_names": ["a", "b"]}
    runs = [finished_run(tmp_path, name) for name in ("seed0", "seed1")]
    for directory in runs:
        (directory / "model.json").write_text(json.dumps(card))
    text = page(replace(read_report(runs, bench_file(tmp_path, (runs[0], 2.0))), figures=Figures(None, [])))
    table = text.split("<caption>Latency in milliseconds by batch size</caption>")[1].split("</table>")[0]
    assert table.count(">2.00<") == table.count(">99.00<") == 2
