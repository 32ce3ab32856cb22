"""Jobs in pairs: order, limit, and jobs that need a running one; with small commands in place of trainings."""

import json
import sys
import time

from benchmarks.budgeted_jobs import Job, Ledger, Runner
from benchmarks.paired_runs import read_results, run_in_pairs

WAIT = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)"


class SlowRunner(Runner):
    """Runner in which all running jobs end while an outcome is recorded."""

    def start(self, job):
        started = super().start(job)
        self.running = [*getattr(self, "running", []), started]
        return started

    def finish(self, *runs):
        super().finish(*runs)
        for run in self.running:
            run.process.wait()


def runner_in(directory, *, budget_s=60.0, kind=Runner):
    program = (sys.executable, "-S", "-c")
    ends_at = time.monotonic() + budget_s
    ledger = Ledger(directory / "ledger.jsonl")
    return kind(ledger, directory / "logs", ends_at=ends_at, least_s=0.0, program=program, environment={})


def quick(name, *needs):
    return Job(name, ["pass"], needs=needs)


def ended_in(directory):
    """Return the names of the jobs in the order in which they ended."""
    return [json.loads(line)["job"] for line in (directory / "ledger.jsonl").read_text().splitlines()]


def test_job_that_needs_a_running_one_lets_others_go_first(tmp_path):
    flag = tmp_path / "flag"
    jobs = [
        Job("cache", [WAIT, str(flag)]),
        quick("first-distilled", "cache"),
        quick("plain"),
        Job("last-plain", [f"open({str(flag)!r}, 'w')"]),
        quick("second-distilled", "cache"),
    ]
    with runner_in(tmp_path) as runner:
        run_in_pairs(runner, jobs, finished=[])
    ended = ended_in(tmp_path)
    assert ended[0] == "plain" and sorted(ended[1:3]) == ["cache", "last-plain"], "the cache ends because of the last plain job"
    assert sorted(ended[3:]) == ["first-distilled", "second-distilled"] and not runner.ledger.not_done


def test_job_that_ends_while_another_is_recorded_is_recorded_too(tmp_path):
    with runner_in(tmp_path, kind=SlowRunner) as runner:
        run_in_pairs(runner, [quick("first"), Job("second", ["import time; time.sleep(0.3)"]), quick("third")], finished=[])
    assert sorted(ended_in(tmp_path)) == ["first", "second", "third"]


def test_finished_jobs_are_left_out_and_failures_stop_those_that_need_them(tmp_path):
    jobs = [Job("cache", ["raise SystemExit(1)"]), quick("plain"), quick("distilled", "cache"), quick("old")]
    with runner_in(tmp_path) as runner:
        run_in_pairs(runner, jobs, finished=["old"])
    assert sorted(ended_in(tmp_path)) == ["cache", "plain"] and runner.ledger.failed == ["cache"]
    assert runner.ledger.not_done == {"distilled": "needs cache, which did not finish"}


def test_end_of_the_budget_stops_and_skips_the_jobs(tmp_path):
    never = str(tmp_path / "never")
    jobs = [Job("cache", [WAIT, never]), Job("plain", [WAIT, never]), quick("distilled", "cache"), quick("late")]
    with runner_in(tmp_path, budget_s=0.5) as runner:
        run_in_pairs(runner, jobs, finished=[])
    assert runner.ledger.not_done.keys() == {"cache", "plain", "distilled", "late"} and not runner.ledger.failed


def test_a_line_that_a_kill_has_cut_is_left_out_and_damages_no_other(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"job": "a", "accuracy": 0.5}\n{"job": "b", "accur')
    assert read_results(path).keys() == {"a"}
    Ledger(path).append('{"job": "c", "accuracy": 0.6}')
    Ledger(path).append('{"job": "d", "accuracy": 0.7}')
    assert read_results(path).keys() == {"a", "c", "d"} and path.read_text().count("\n") == 4


def test_a_job_that_failed_before_the_end_of_the_budget_has_failed(tmp_path):
    with runner_in(tmp_path, budget_s=0.5) as runner:
        started = runner.start(Job("broken", ["raise SystemExit(3)"]))
        started.process.wait()
        time.sleep(0.5)
        runner.finish(started)
    assert runner.ledger.failed == ["broken"] and runner.ledger.not_done == {}
