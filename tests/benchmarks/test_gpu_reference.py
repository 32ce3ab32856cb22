"""Reference job on a GPU: a trial with kd_accel; budgets and failures with a fast replacement of its commands."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu_reference
from benchmarks.budgeted_jobs import Job, Ledger, Runner
from benchmarks.gpu_reference_chain import Chain, Options
from benchmarks.gpu_reference_plan import FirstRates, choose, fitting_epochs, pair
from kd_accel.config.parsing import flatten, parse_config
from kd_accel.config.schema import RunConfig
from tests.support.hidden_packages import hidden_environment, imports_of_hidden
from tests.support.launching import ROOT, environment
from tests.support.quick_product import STEPS_PER_EPOCH

RATES = FirstRates(startup_s=20.0, trained_s=2.0, steps_per_epoch=87, teacher_step_s=0.010, student_step_s=0.005)
ROWS = {
    "pair": ["teacher", "plain-0", "distilled-0"],
    "reference": ["teacher", "student", "hybrid-fixed", "hybrid-scheduled"],
}
OTHERS = ["cache-build", "cache-verify", "timed-cached", "timed-live", "bench", "report"]


def lines_in(out):
    return lines_in_file(out / "gpu_reference.jsonl")


def lines_in_file(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_job(out):
    """Return {job: its line}."""
    return {line["job"]: line for line in lines_in(out) if "job" in line}


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Return a function that runs gpu_reference with quick_product and returns (exit code, directory of the results)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*flags, **settings):
        monkeypatch.setenv("QUICK_PRODUCT", json.dumps(settings))
        monkeypatch.setattr(gpu_reference, "_PROGRAM", (sys.executable, "-m", "tests.support.quick_product"))
        monkeypatch.setattr(sys, "argv", ["gpu_reference", f"--out={tmp_path / 'out'}", "--trial", *flags])
        try:
            gpu_reference.main()
        except SystemExit as exited:
            return exited.code, tmp_path / "out"
        return 0, tmp_path / "out"

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["pair", pytest.param("reference", marks=pytest.mark.faults)])
def test_trial(part, tmp_path):
    """Run a trial without wandb, datasets, matplotlib, scikit-learn, timm and git, all of which are optional."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu_reference", f"--out={out}", f"--part={part}", "--trial", "--budget_s=500"]
    variables = hidden_environment(tmp_path / "hidden", TMPDIR=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert imports_of_hidden(tmp_path / "hidden") == {("matplotlib", "kd_accel.report.plots")}
    jobs, rows = by_job(out), ROWS[part]
    assert jobs.keys() == {*rows, *OTHERS, "epochs", f"{rows[1]}-stop"}
    for name in rows:
        assert jobs[name]["steps"] == 20 and jobs[name]["epochs"] == 2 and 0 <= jobs[name]["accuracy"] <= 1
    assert all(0 <= jobs[name]["agreement"] <= 1 for name in rows[2:])
    stopped, resumed = jobs[f"{rows[1]}-stop"], jobs[rows[1]]
    assert stopped["code"] == resumed["stopped_with_code"] == 143
    assert 7 <= stopped["checkpoint_steps"][-1] == resumed["resumed_from_step"] < resumed["first_step_shown"] <= 20
    assert jobs["cache-verify"]["is_intact"] and jobs["cache-build"]["samples_per_second"] > 0
    assert all(len(jobs[f"timed-{outputs}"]["rates"]) == 3 for outputs in ("cached", "live"))
    closing = json.loads(done.stdout.splitlines()[-1])
    assert lines_in(out)[-1] == closing and closing["benchmark"] == "gpu-reference"
    assert {"commit", "hardware", "versions"} <= closing.keys() and list(closing["ratios"]) == ["cached/live"]
    assert closing["commit"] is None and closing["versions"]["datasets"] is None and closing["versions"]["torch"]
    assert closing["notes"]["accuracy"] == {name: jobs[name]["accuracy"] for name in rows}
    assert closing["notes"]["failed"] == [] and closing["notes"]["not_done"] == {}
    table = json.loads((out / "report" / "results.json").read_text())["rows"]
    assert [row["name"] for row in table] == rows and all(row["latency_ms"] > 0 for row in table)
    assert not list(tmp_path.glob("gpu-reference-*")), "runs and caches are removed"


@pytest.mark.slow
def test_jobs_are_skipped_without_gpu_or_time(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_reference", f"--out={tmp_path}", "--part=pair"]
    variables = environment(CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "no GPU was found; nothing was measured\n")
    command += ["--trial", "--seeds=2", "--budget_s=1"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    skipped, closing = lines_in(tmp_path)
    assert set(skipped["not_done"]) == {*ROWS["pair"], "plain-1", "distilled-1", *OTHERS} == skipped["reasons"].keys()
    assert skipped["reasons"]["teacher"].startswith("takes 10 s or more, and ")
    assert skipped["reasons"]["distilled-0"] == "needs teacher and cache-build, which did not finish"
    assert closing["notes"]["not_done"] == skipped["reasons"] and closing["ratios"] == {}


def test_all_seeds_run_if_they_fit(quick):
    code, out = quick("--part=pair", "--seeds=2")
    jobs = by_job(out)
    assert code == 0 and lines_in(out)[-1]["notes"]["not_done"] == {}
    assert list(lines_in(out)[-1]["notes"]["accuracy"]) == ["teacher", "plain-0", "plain-1", "distilled-0", "distilled-1"]
    assert (jobs["distilled-1"]["seed"], jobs["distilled-0"]["seed"], jobs["epochs"]["restarts"]) == (1, 0, False)


def test_slow_first_steps_reduce_the_epochs(quick):
    code, out = quick("--part=reference", step_s={"teacher": 60.0})
    jobs, stops = by_job(out), [line.get("job") for line in lines_in(out)].count("student-stop")
    assert code == 0 and jobs["epochs"]["restarts"] and jobs["epochs"]["epochs"] == 1 and stops == 2
    for name in ROWS["reference"]:
        assert (jobs[name]["epochs"], jobs[name]["epochs_planned"], jobs[name]["steps"]) == (1, 2, STEPS_PER_EPOCH)


@pytest.mark.parametrize(("student_step_s", "not_done"), [(2.0, []), (2.5, ["plain-1", "distilled-1"])])
def test_second_seed_runs_last_or_is_skipped(quick, student_step_s, not_done):
    code, out = quick("--part=pair", "--seeds=2", step_s={"plain-0": student_step_s})
    jobs, lines = by_job(out), lines_in(out)
    assert code == 0 and jobs["epochs"]["rows"] == ROWS["pair"] and not jobs["epochs"]["restarts"]
    assert [name for line in lines for name in line.get("not_done", [])] == not_done
    assert not_done or list(jobs).index("distilled-1") > list(jobs).index("timed-live")


@pytest.mark.parametrize(
    ("fails", "not_done"),
    [
        ("distilled-0", []),
        ("timed-live", []),
        ("bench", []),
        ("plain-0", ["plain-0-stop"]),
        ("cache-build", ["distilled-0", "cache-verify", "timed-cached"]),
        ("teacher", ["cache-build", "distilled-0", "cache-verify", "timed-cached", "timed-live"]),
    ],
)
def test_failing_job_does_not_affect_independent_jobs(quick, fails, not_done):
    code, out = quick("--part=pair", fails=[fails])
    jobs, closing = by_job(out), lines_in(out)[-1]["notes"]
    assert code == 1 and closing["failed"] == [fails] and list(closing["not_done"]) == not_done
    assert jobs[fails]["failed"] and jobs[fails]["code"] == 1 and jobs[fails]["stderr"] == [f"{fails} fails on purpose"]
    others = {*ROWS["pair"], *OTHERS} - {fails, *not_done}
    assert all(jobs[name]["code"] == 0 for name in others)


def test_epochs_and_seeds_are_chosen_by_the_time_left():
    part = pair("no_pool", (0, 1))
    all_seeds_s, first_seed_s = (
        next(left_s for left_s in range(1000) if fitting_epochs(each, RATES, left_s=left_s + RATES.trained_s) >= 30)
        for each in (part, part.of_first_seed())
    )
    assert 100 < first_seed_s < all_seeds_s < 205, "thirty epochs fit into four minutes at the expected rates"
    times_s = (all_seeds_s, all_seeds_s - 1, first_seed_s, first_seed_s - 1, 1)
    choices = {left_s: choose(part, RATES, left_s=left_s) for left_s in times_s}
    assert choices[all_seeds_s].part == part
    assert choices[all_seeds_s - 1].part == choices[first_seed_s].part == part.of_first_seed()
    assert [choice.restarts for choice in choices.values()] == [False, False, False, True, True]
    assert 10 <= choices[first_seed_s - 1].part.epochs < 30 and choices[1].part.epochs == 1
    assert [row.name for row in choices[1].part.rows] == ["teacher", "plain-0", "distilled-0"]


def parsed(*arguments):
    config, _ = parse_config(RunConfig, arguments)
    return flatten(config.model_dump())


@pytest.mark.parametrize("part", ["pair", "reference"])
def test_flags_of_the_full_job_are_valid(part, tmp_path):
    options = Options(Path("DIR"), tmp_path, part, 240.0, "no_pool", 2, None, None, False, None)
    chain = Chain(options, tmp_path, runner(tmp_path, seconds=60))
    trainings = {row.name: parsed(*chain.training(row).arguments[1:]) for row in chain.part.rows}
    assert {settings["train.precision"] for settings in trainings.values()} == {"bf16" if part == "pair" else "float32"}
    timed = {outputs: parsed(*chain.timed(outputs).arguments[1:]) for outputs in ("cached", "live")}
    changed = {key for key in timed["live"] if timed["live"][key] != timed["cached"][key]} - {"name", "run_dir"}
    assert changed == {"teacher.outputs"}
    distilled = trainings[chain.part.distilled[0].name]
    for action, first in (("build", 2), ("verify", 3)):
        cache = parsed(*chain.cache(action, "teacher").arguments[first:])
        assert {key for key in cache if cache[key] != distilled[key]} == {"run_dir"}


def test_part_reference_has_the_settings_of_the_configs(tmp_path):
    options = Options(Path("DIR"), tmp_path, "reference", 240.0, "no_pool", 2, None, None, False, None)
    chain = Chain(options, tmp_path, runner(tmp_path, seconds=60))
    local = {"name", "run_dir", "data.source", "teacher.run", "teacher.cache.dir", "tracking.wandb"}
    without_effect_on_the_model = {"train.eval_every_epochs", "checkpoint.every_epochs"}
    files = ["teacher_scratch", "student", "hybrid_fixed", "hybrid_scheduled"]
    for row, file in zip(chain.part.rows, files, strict=True):
        settings, expected = parsed(*chain.training(row).arguments[1:]), parsed(f"--config={ROOT}/configs/cifar10/{file}.yaml")
        assert {key for key in settings if settings[key] != expected[key]} <= local | without_effect_on_the_model
        assert settings["train.epochs"] == 30


def runner(tmp_path, *, seconds):
    ledger = Ledger(tmp_path / "lines.jsonl")
    ends_at = time.monotonic() + seconds
    return Runner(ledger, tmp_path / "logs", ends_at=ends_at, least_s=0.0, program=("sh", "-c"), environment={})


def is_gone(pid):
    """Return whether a process ends within ten seconds: a kill takes effect after the call."""
    for _ in range(1000):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
                continue
        return True
    return False


def test_processes_of_a_job_are_stopped_when_the_budget_ends(tmp_path):
    with runner(tmp_path, seconds=1.0) as jobs:
        run = jobs.start(Job("long", ["sleep 600 & echo $!; echo long: step 3/9, >&1; wait"]))
        jobs.finish(run, jobs.start(Job("short", ["exit 0"])))
        assert jobs.ledger.not_done == {"long": "stopped when the budget ended after step 3 of 9"}
        assert list(jobs.ledger.done) == ["short"] and jobs.ledger.failed == []
        assert jobs.start(Job("late", ["exit 0"])) is None and "of the budget are left" in jobs.ledger.not_done["late"]
    assert is_gone(int(run.outcome().stdout.split()[0]))


def test_job_that_ignores_sigterm_is_killed(tmp_path):
    with runner(tmp_path, seconds=60) as jobs:
        run = jobs.start(Job("stubborn", ["trap '' TERM; echo ready; while :; do sleep 0.05; done"]))
        assert jobs.wait_until(lambda: "ready" in run.stdout.read_text(), run)
        jobs.stop(run, grace_s=0.3)
        assert run.process.returncode == -signal.SIGKILL


def test_running_jobs_are_killed_after_an_exception(tmp_path):
    with pytest.raises(KeyError), runner(tmp_path, seconds=60) as jobs:
        run = jobs.start(Job("long", ["sleep 600"]))
        raise KeyError
    run.process.wait(timeout=10)


def test_job_without_figures_counts_as_failed(tmp_path):
    with runner(tmp_path, seconds=60) as jobs:
        jobs.run(Job("empty", ["echo said >&2"], figures=lambda outcome: {"first": outcome.steps_shown[0]}))
    (line,) = lines_in_file(tmp_path / "lines.jsonl")
    assert line["failed"] and line["error"].startswith("IndexError") and line["stderr"] == ["said"]
