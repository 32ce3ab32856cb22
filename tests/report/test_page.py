"""The page: escaped, self-contained, without paths of the machine, and with each part or the reason why it is left out."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

from kd_accel.report.content import Figures
from kd_accel.report.output import read_report
from kd_accel.report.page import page
from tests.report.runs import bench_file, finished_run, unfinished_run, write_predictions, write_settings

HOSTILE = """<script>alert("x")</script>' onload='y"""


class Parsed(HTMLParser):
    """Elements of a page: start tags with attributes, and the tags that are closed in the wrong order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.wrong = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def page_of(runs, bench=None, figures=None):
    return page(replace(read_report(runs, bench), figures=figures))


def complete_runs(root):
    """Create a teacher, two seeds of a student with predictions, and an unfinished run, with hostile names."""
    names = {"data": {"label_names": ["cat", HOSTILE], "test": {"samples": 3}}, "source": "imagefolder:/home/me/data/photos"}
    more = {"device": "cpu", "commit": "0123456789abcdef", "versions": {"torch": "2.8", "kd_accel": "0.1.0"}, "seconds": 12.3}
    teacher = finished_run(root, "large", role="teacher", name=HOSTILE, **names, **more)
    write_settings(teacher, train={"epochs": 9}, role="teacher")
    students = [finished_run(root, f"small-seed{seed}", role="distilled", agreement=0.5, **names, **more) for seed in (0, 1)]
    for seed, directory in enumerate(students):
        write_settings(directory, seed=seed, teacher={"run": "/home/me/runs/teacher"}, model={"arch": HOSTILE})
        write_predictions(directory, labels=[0, 1, 1], predicted=[0, 0, 0], teacher=[0, 0, 1])
    return [teacher, *students, unfinished_run(root, "new")]


def test_everything_is_escaped_and_well_formed(tmp_path):
    runs = complete_runs(tmp_path)
    text = page_of(runs, bench_file(tmp_path, *((run, 2.0) for run in runs[:3])))
    parsed = Parsed(text)
    assert parsed.wrong == [] and parsed.open == []
    assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "embed", "form"} == set()
    assert not any(name.startswith("on") for _, attributes in parsed.tags for name in attributes)
    assert text.count("&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;&#x27; onload=") > 5


def test_nothing_is_loaded(tmp_path):
    text = page_of(complete_runs(tmp_path), figures=Figures(None, []))
    parsed = Parsed(text)
    sources = [attributes["src"] for _, attributes in parsed.tags if "src" in attributes]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any("href" in attributes for _, attributes in parsed.tags)
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    policy = {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; img-src data:; style-src 'unsafe-inline'",
    }
    assert ("meta", policy) in parsed.tags


def test_no_path_of_the_machine_but_the_run_directories(tmp_path):
    runs = complete_runs(tmp_path)
    text = page_of(runs)
    for directory in runs:
        text = text.replace(str(directory), "")
    assert "/home/me" not in text and str(tmp_path) not in text and "…/runs/teacher" in text and "…/data/photos" in text


def rows(text, caption):
    """Return the cells of a table as text."""
    content = text.split(f"<caption>{caption}</caption>")[1].split("</table>")[0]
    found = re.findall(r"<tr[^>]*>(.*?)</tr>", content, re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in found]


def test_table_of_results(tmp_path):
    runs = complete_runs(tmp_path)
    table = rows(page_of(runs), "Results by run")
    assert table[0] == [
        "Model", "Accuracy (%)", "Gap to teacher (points)", "Agreement (%)", "Parameters (M)", "Compression"
    ]  # fmt: skip
    assert table[2][1:] == ["75.06", "0.00", "50.00", "11.18", "1.0×"]
    assert table[4] == ["smallmean ± standard deviation, n = 2", "75.06 ± 0.00", "0.00 ± 0.00", "50.00 ± 0.00", "11.18", "1.0×"]
    assert table[5][0].startswith("new studentunfinished, step 4 of 6") and table[5][1:] == [""] * 5


def test_classes_confusion_and_errors(tmp_path):
    runs = complete_runs(tmp_path)
    text = page_of(runs)
    table = rows(text, "Accuracy by class in percent")
    assert table[0][:3] == ["Class", "Test samples", "small-seed0"] and table[1] == ["cat", "1", "100.0", "100.0"]
    assert table[2][1:] == ["2", "0.0", "0.0"]
    assert text.count('--share:0.000">100.0<') == text.count('--share:1.000">0.0<') == 2
    assert [row[1:] for row in rows(text, "Confusion of classes")[1:]] == [["1", ""], ["2", ""]]
    assert "Not shown, because they have no stored predictions of labeled samples: &lt;script" in text
    assert "→ cat</b> 90.0 %<br>teacher: &lt;script" in text and "→ cat</b> 70.0 %<br>teacher: cat" in text


def test_runs_with_other_test_samples_have_a_table_of_their_own(tmp_path):
    runs = [finished_run(tmp_path, name) for name in "ab"]
    write_predictions(runs[0], labels=[0, 1, 1], predicted=[0, 0, 1])
    write_predictions(runs[1], labels=[0, 0, 0, 1], predicted=[0, 0, 1, 1])
    tables = page_of(runs).split("<caption>Accuracy by class in percent</caption>")[1:]
    shown = [rows(f"<caption>x</caption>{table}", "x") for table in tables]
    assert shown == [
        [["Class", "Test samples", "a"], ["a", "1", "100.0"], ["b", "2", "50.0"]],
        [["Class", "Test samples", "b"], ["a", "3", "66.7"], ["b", "1", "100.0"]],
    ]


def test_many_classes_have_the_worst_and_the_most_frequent_confusions(tmp_path):
    names = [f"class {number}" for number in range(60)]
    run = finished_run(tmp_path, "a", data={"label_names": names})
    labels = list(range(60))
    write_predictions(run, labels=labels, predicted=[label if label < 57 else 0 for label in labels])
    text = page_of([run])
    table = rows(text, "Accuracy by class in percent")
    assert [row[0] for row in table[1:4]] == ["class 57", "class 58", "class 59"] and len(table) == 11
    assert "The 10 classes of 60 with the lowest mean accuracy." in text
    confusions = rows(text, "Most frequent confusions")
    assert confusions[1:] == [[f"class {number} → class 0", "1"] for number in (57, 58, 59)]


def test_parts_that_are_left_out_have_a_sentence(tmp_path):
    text = page_of([finished_run(tmp_path, "a")], figures=Figures(None, []))
    for part in (
        "no run has stored predictions",
        "No run has an accuracy and a latency",
        "No setting differs",
        "no metrics yet",
    ):
        assert part in text
    assert page_of([tmp_path / "a"]).count("matplotlib was not installed") == 2


def test_figures_and_legend(tmp_path):
    run = finished_run(tmp_path, "a")
    text = page_of([run], figures=Figures("<svg>scatter</svg>", [("Title & more", "<svg>curve</svg>")]))
    assert "<svg>scatter</svg>" in text and "<h3>Title &amp; more</h3><svg>curve</svg>" in text
    assert text.count("stroke:var(--run0)") == 1 and "prefers-color-scheme:dark" in text


def test_hardware_threads_batch_sizes_and_versions(tmp_path):
    runs = complete_runs(tmp_path)
    path = bench_file(tmp_path, *((run, 2.0) for run in runs[:3]))
    hardware = {"cpu": "A CPU", "cpus": 4, "gpu": None}
    more = {
        "threads": 1,
        "hardware": hardware,
        "settings": {"batch_sizes": [1, 32]},
        "versions": {"torch": "2.8", "cuda": None},
    }
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    text = page_of(runs, path)
    facts = dict(rows(text, "Hardware of the benchmark")[1:])
    assert facts == {
        "Device": "cpu", "CPU": "A CPU", "CPU cores": "4", "Threads": "1", "Batch sizes": "1, 32", "Versions": "torch 2.8"
    }  # fmt: skip
    assert rows(text, "Latency in milliseconds by batch size")[0::4] == [
        ["Model", "batch size 1", "batch size 32"],
        ["new", "", ""],
    ]
    assert rows(text, "Trainings by run")[2] == ["small-seed0", "cpu", "", "", "", "12", "", "0.1.0", "2.8", "0123456789"]
