"""The whole chain with one command, and the benchmark of training: real processes to their end."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.launching import ROOT, SMALL, environment, run, summary


@pytest.mark.slow
def test_reproduce_runs_the_chain_once_and_skips_what_is_done(tmp_path):
    flags = {flag[2:].split("=", 1)[0]: yaml.safe_load(flag.split("=", 1)[1]) for flag in SMALL}
    settings = {}
    for key, value in flags.items():
        section, name = key.split(".")
        settings.setdefault(section, {})[name] = value
    files = []
    for name, more in (("teacher", {"role": "teacher"}), ("student", {"teacher": {"run": str(tmp_path / "teacher")}})):
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump({**settings, "run_dir": str(tmp_path / name), "name": name, **more})
        )
        files.append(str(tmp_path / f"{name}.yaml"))
    chain = {"runs": files, "launch": "launch/cpu2.yaml", "report_dir": str(tmp_path / "report")}
    bench = {"batch_sizes": [1], "threads": 1, "min_iterations": 20, "min_time_s": 0.01}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({**chain, "bench": bench}))
    first = run("reproduce", "--config", tmp_path / "chain.yaml", "--", "--train.epochs=1")
    assert "| student (distilled) | import:tests.own_models:student |" in first.stdout
    assert summary(tmp_path / "student")["world_size"] == 2
    assert summary(tmp_path / "student")["steps"] == 8
    written = (tmp_path / "student/model.safetensors").stat().st_mtime_ns, (tmp_path / "report/bench.json").stat().st_mtime_ns
    second = run("reproduce", "--config", tmp_path / "chain.yaml", "--", "--train.epochs=1")
    assert second.stdout.count("finished already") == 2
    again = (tmp_path / "student/model.safetensors").stat().st_mtime_ns, (tmp_path / "report/bench.json").stat().st_mtime_ns
    assert again == written
    wrong = run("reproduce", "--config", tmp_path / "chain.yaml", "--", "--train.epoch=1", code=2)
    assert wrong.stderr.count("did you mean train.epochs?") == 2


@pytest.mark.slow
def test_the_training_benchmark_ends_with_a_line_of_json(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--suite", "quick", "--repeats", "2"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert {"benchmark", "commit", "hardware", "versions", "medians", "spread", "ratios"} <= line.keys()
    assert 0.3 < line["ratios"]["plain/bare"] < 2
