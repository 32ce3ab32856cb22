"""Acceptance test of a GPU: a trial on a CPU, and cases that fail, crash, hang or exceed the budget."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.autograd import DeviceType

from benchmarks import bare
from benchmarks.acceptance import agreement, losses, ranks, speed, steps
from benchmarks.acceptance.guard import Part
from benchmarks.acceptance.plan import ITEMS, planned
from benchmarks.acceptance.record import Setting
from benchmarks.acceptance.runs import relative_difference
from benchmarks.acceptance.starting import NotRun, Started, Starter
from benchmarks.gpu_acceptance import run
from benchmarks.harness import has_compiler
from benchmarks.synthetic import NAN_POSITION, faulty_student
from tests.support.hidden_packages import hidden_environment, imports_of_hidden
from tests.support.launching import ROOT, environment


def acceptance(out, *flags, env=None):
    """Run the acceptance test in a new process."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_acceptance", f"--out={out}", *flags],
        cwd=ROOT,
        env=env or environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def lines_of(out):
    """Return ({item/case: line}, closing line)."""
    *lines, closing = map(json.loads, (out / "gpu_acceptance.jsonl").read_text().splitlines())
    return {f"{line['item']}/{line['case']}": line for line in lines}, closing


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    """Run a trial without wandb, datasets, matplotlib, scikit-learn, timm and git, all of which are optional.

    Returns:
        ({item/case: line}, closing line).
    """
    out, hidden = tmp_path_factory.mktemp("acceptance"), tmp_path_factory.mktemp("hidden")
    done = acceptance(out, "--trial", "--budget_s=480", env=hidden_environment(hidden, CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert imports_of_hidden(hidden) == set()
    assert done.stdout.splitlines()[-1] == (out / "gpu_acceptance.jsonl").read_text().splitlines()[-1]
    return lines_of(out)


@pytest.mark.slow
def test_every_case_is_recorded_and_passes(trial):
    lines, closing = trial
    names = [f"{part.item}/{part.label(case)}" for part in planned(is_trial=True) for case in part.cases]
    not_run = {"b/bf16/compiled": "trial"}
    if not has_compiler():
        not_run |= {"g/plain": "no compiler", "g/live_hybrid": "no compiler"}
    assert sorted([*lines, *not_run]) == sorted(names)
    assert {name.partition("/")[0] for name in names} == set(ITEMS)
    assert closing["benchmark"] == "gpu-acceptance" and {"commit", "hardware", "versions"} <= closing.keys()
    notes = closing["notes"]
    assert sorted(notes["ok"]) == sorted(lines) and notes["failed"] == [] and notes["not_run"] == not_run
    assert all({"ok", "seconds", "commit", "card", "versions"} <= line.keys() for line in lines.values())
    assert closing["commit"] is None and closing["versions"]["datasets"] is None and closing["versions"]["torch"]


@pytest.mark.slow
def test_steps_of_each_variant_are_checked(trial):
    lines = [line for name, line in trial[0].items() if name.startswith("a/")]
    assert len(lines) == 2 * len(steps.VARIANTS)
    assert {line["checked_steps"] for line in lines} == {2}
    assert all(line["loss"] > 0 for line in lines)


@pytest.mark.slow
def test_speed_figures_of_trainings_and_limits(trial):
    for case in ("float32/128", "float32/1024", "bf16/128", "bf16/1024"):
        line = trial[0][f"b/{case}"]
        assert line["cases"].keys() == set(speed.NAMES)
        assert list(line["ratios"]) == ["/".join(ratio) for ratio in speed.RATIOS if set(ratio) <= set(speed.NAMES)]
        assert line["note"] == "without a GPU no graph is recorded"
        for figures in line["cases"].values():
            # Rounded to a tenth of an image.
            assert figures["images_per_s"] == pytest.approx(1000 * line["batch_size"] / figures["ms_per_step"], abs=0.051)
            assert figures["start_s"] > 0 and figures["peak_mib"] is None  # without a GPU
    for precision in ("float32", "bf16"):
        cases = trial[0][f"b/{precision}/kernels"]["cases"]
        assert list(cases) == [f"{batch_size}/{name}" for batch_size in (128, 1024) for name in speed.NAMES]
        assert {value for figures in cases.values() for value in figures.values()} == {None}  # without a GPU
    assert trial[1]["medians"]["b/bf16/128/plain"] == trial[0]["b/bf16/128"]["cases"]["plain"]["images_per_s"]


@pytest.mark.slow
def test_compiled_loop_is_measured_next_to_loops_that_are_not(tmp_path, monkeypatch):
    # The compiler itself takes minutes on a CPU, and so do steps in bf16.
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **settings: compiled.append((type(module), settings)))
    AcceleratorState._reset_state(reset_partial_state=True)
    figures = speed.Speed(Setting(True, tmp_path, None), "float32").measure("128", speed.COMPILED_NAMES)
    assert figures["ok"] and list(figures["cases"]) == ["bare_compiled", "bare", "bare_graph", "plain"]
    assert set(figures["ratios"]) == {"plain/bare", "plain/bare_graph", "plain/bare_compiled", "bare_compiled/bare"}
    assert compiled == [(bare._Student, {"dynamic": False})]


def test_compiled_loop_needs_time_and_a_compiler(tmp_path, monkeypatch):
    def reason(left_s, *, is_trial=False):
        (case,) = speed.build_compiled(Setting(is_trial, tmp_path, None), SimpleNamespace(left_s=left_s)).values()
        with pytest.raises(NotRun) as raised:
            case()
        return str(raised.value)

    monkeypatch.setattr(speed, "has_compiler", lambda: True)
    assert reason(10.0) == "budget" and reason(1000.0, is_trial=True) == "trial"
    monkeypatch.setattr(speed, "has_compiler", lambda: False)
    assert reason(1000.0) == "no compiler"


@pytest.mark.slow
def test_losses_views_and_caches_agree(trial):
    lines = trial[0]
    for name in ("c/losses/float32", "c/losses/tf32"):
        assert lines[name]["largest_relative_difference"] == 0 and lines[name]["steps"] == 10
    assert {lines[f"c/views/{name}"]["differing_values"] for name in agreement.TRANSFORMS} == {0}
    assert lines["c/cached-live/float32"]["largest_difference"] == 0
    assert (
        0 < lines["c/cached-live/float16"]["largest_difference"] < lines["c/cached-live/bfloat16"]["largest_difference"] < 0.01
    )
    assert lines["d/losses"]["largest_relative_difference"] < 1e-10 and lines["d/losses"]["steps"] == 20
    assert lines["d/2-to-1"]["largest_relative_difference"] < 1e-10 and lines["d/2-to-1"]["steps"] == 20
    assert lines["d/cache"]["files"] > 5 and lines["d/cache"]["differing_files"] == []
    assert lines["d/nccl"]["backend"] == "gloo" and lines["d/nccl"]["largest_difference"] == 0


@pytest.mark.slow
def test_signal_resume_and_nan(trial):
    lines = trial[0]
    assert lines["d/sigterm"]["exit_code"] == 143 and lines["d/sigterm"]["same_bytes"]
    # An exchange that began after step 9 at the latest is followed by one 8 steps later, which is read after its next step.
    assert 10 <= lines["d/sigterm"]["steps_before"] <= 18
    for name in ("e/resume/float32", "e/resume/bf16"):
        assert lines[name]["same_bytes"] and lines[name]["same_metrics"] and lines[name]["steps"] == 20
    (message,) = lines["e/logits/bf16"]["message"]
    assert "ce is not finite on rank 0 (the student's logits of sample " in message and "at step 5: the training" in message
    (message,) = lines["e/gradient/bf16"]["message"]
    assert message.startswith("the gradient of layer1.0.weight is not finite (rank 0 had samples ")
    assert "at step 5: the training" in message


@pytest.mark.slow
def test_caches_and_compiled_trainings(trial):
    lines = trial[0]
    for case, batch_size in (("f/build", 16), ("f/build-1024", 32)):
        line, forward = lines[case], lines["f/forward"]["cases"][str(batch_size)]["images_per_s"]
        assert line["images"] == 64 + 64 and line["batch_size"] == batch_size
        assert line["build/forward"] == pytest.approx(line["images_per_s"] / forward, rel=0.02)
    assert 0 < lines["f/verify"]["largest_difference"] < 0.01
    if has_compiler():
        assert lines["g/plain"]["images_per_s"] > 0 and lines["g/plain"]["start_s"] > 0


@pytest.mark.slow
def test_only_runs_the_named_items(tmp_path):
    done = acceptance(tmp_path, "--trial", "--only=f")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(lines_of(tmp_path)[0]) == ["f/forward", "f/build", "f/build-1024", "f/verify", "f/rebuild"]
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 3 and files[1:] == ["gpu_acceptance.jsonl", "gpu_acceptance.log"], "the directory of logs is removed"
    assert "== f-verify" in (tmp_path / "gpu_acceptance.log").read_text()
    done = acceptance(tmp_path, "--trial", "--only=f,z")
    assert done.returncode == 2 and "--only: z is not a valid item; choose from a, b, c, d, e, f, g, h" in done.stderr


def test_every_transform_and_storage_type_is_planned():
    (part,) = [part for part in planned(is_trial=False) if part.build == "benchmarks.acceptance.agreement:build"]
    views = [f"views/{name}" for name in agreement.TRANSFORMS]
    assert list(part.cases) == [*views, *(f"cached-live/{dtype}" for dtype in agreement.TYPES)]


def gpu_lines():
    """Return the lines of JSON that the programs have written on a GPU."""
    return [json.loads(line) for line in (ROOT / "docs/gpu-2026-11-27.jsonl").read_text().splitlines()]


def test_gpu_page_has_a_row_for_each_item():
    page = (ROOT / "docs/gpu.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith(("| gpu_", "| kd-accel bench"))]
    assert [row[1] for row in rows if row[0] == "| gpu_acceptance"] == list(ITEMS)
    assert [row[1] for row in rows if row[0] == "| gpu_reference"] == ["pair", "reference"]
    measured = {line["item"] for line in gpu_lines() if "item" in line} | {"pair", "g"}
    assert {row[1] for row in rows if row[-1] != "not run |"} == measured


def test_rates_on_the_gpu_page_are_those_of_the_lines():
    lines = {
        line["case"]: line["cases"] for line in gpu_lines() if line.get("item") == "b" and not line["case"].endswith("kernels")
    }
    assert list(lines) == ["float32/128", "float32/1024", "bf16/128", "bf16/1024"]
    page = (ROOT / "docs/gpu.md").read_text().split("## Speed")[1].split("\n## ")[0]
    for name in lines["bf16/128"]:
        rates = " | ".join(f"{figures[name]['images_per_s']:,.0f}" for figures in lines.values())
        row = f"`{name.removesuffix('_eager')}`{' without a graph' * name.endswith('_eager')}"
        assert f"| {row} | {rates} |" in page, name


@pytest.mark.slow
def test_nothing_is_measured_without_a_gpu(tmp_path):
    done = acceptance(tmp_path)
    assert (done.returncode, done.stdout) == (0, "no GPU was found; nothing was measured\n"), done.stderr
    assert not (tmp_path / "gpu_acceptance.jsonl").exists()


@pytest.mark.slow
def test_closing_line_is_written_after_sigterm(tmp_path):
    argv = [sys.executable, "-m", "benchmarks.gpu_acceptance", f"--out={tmp_path}", "--trial", "--only=b"]
    process = subprocess.Popen(argv, cwd=ROOT, env=environment(CUDA_VISIBLE_DEVICES=""), stdout=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "logs/b-float32-1.log").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        printed, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    closing = json.loads(printed.splitlines()[-1])
    assert closing["notes"]["not_run"] == dict.fromkeys(
        [f"b/{precision}/{case}" for precision in ("float32", "bf16") for case in ("128", "1024", "kernels")]
        + ["b/bf16/compiled"],
        "budget",
    )
    assert lines_of(tmp_path) == ({}, closing)


@pytest.mark.slow
def test_failing_case_does_not_affect_other_cases(tmp_path):
    cases = [
        *("passes", "wrong_figures", "raises", "raises_in_kd_accel", "exits"),
        *("cuda_error", "crashes", "hangs", "passes_later"),
    ]
    # The time limit of a case must be longer than the start of a process.
    parts = [
        Part("a", "x", cases, "tests.support.faulty_cases:build", in_child=True, limit_s=15),
        Part("b", "", ["one", "other"], "tests.support.faulty_cases:failing_build", in_child=True, is_timed=True),
        Part("c", "", ["command", "refused"], "tests.support.faulty_cases:build_commands", is_timed=True),
        Part("d", "", ["absent"], "tests.support.faulty_cases:build_commands", is_timed=True),
    ]
    with Starter(tmp_path / "logs", budget_s=200) as starter:
        assert run(parts, tmp_path, starter) is False
    lines, closing = lines_of(tmp_path)
    assert closing["notes"]["ok"] == ["a/x/passes", "a/x/passes_later", "c/command"] and closing["notes"]["not_run"] == {}
    assert sorted(closing["notes"]["failed"]) == sorted(lines.keys() - {"a/x/passes", "a/x/passes_later", "c/command"})
    assert lines["a/x/wrong_figures"]["difference"] == 1.5
    assert lines["a/x/raises"]["error"] == "ValueError: first line\nsecond line\n0\n1" and lines["a/x/raises"]["where"] is None
    assert lines["a/x/raises_in_kd_accel"]["where"].startswith("kd_accel/models/feature_extractor.py:")
    assert lines["a/x/exits"]["error"] == "SystemExit: 4"
    assert lines["a/x/cuda_error"]["error"].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert lines["a/x/crashes"]["error"].startswith("the process ended with exit code -9")
    assert lines["a/x/hangs"]["error"].startswith("a-x-3 did not end within 15 s")
    assert lines["a/x/passes_later"]["pid"] != lines["a/x/passes"]["pid"]
    assert "the network cannot be built" in lines["b/one"]["error"] and lines["b/one"]["error"] == lines["b/other"]["error"]
    assert (
        lines["c/refused"]["error"].startswith("RuntimeError: refused ended with exit code 2, expected 0")
        and "trane" in lines["c/refused"]["error"]
    )
    assert lines["d/absent"]["error"] == "KeyError: 'absent'"


@pytest.mark.slow
def test_cases_beyond_the_budget_are_recorded_as_not_run(tmp_path):
    parts = [
        Part("a", "x", ["passes", "hangs", "passes_later"], "tests.support.faulty_cases:build", in_child=True),
        Part("b", "", ["hangs", "never_started"], "tests.support.faulty_cases:build_commands", is_timed=True),
    ]
    with Starter(tmp_path / "logs", budget_s=1e9) as starter:
        starter.choose_method()
        starter._ends_at = starter._ends_at - starter.left_s + 8
        assert run(parts, tmp_path, starter) is True
    lines, closing = lines_of(tmp_path)
    assert list(lines) == closing["notes"]["ok"] == ["a/x/passes"]
    not_run = ["a/x/hangs", "a/x/passes_later", "b/hangs", "b/never_started"]
    assert closing["notes"]["not_run"] == dict.fromkeys(not_run, "budget")


def test_synchronization_is_forbidden_only_in_checked_steps(tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(steps, "_set_sync_debug_mode", modes.append)
    guard = steps.SyncGuard(tmp_path, first=3, steps=10)
    modes_of_steps = []
    for _ in range(14):
        modes_of_steps.append(modes[-1] if modes else "default")
        guard.step()
    assert modes_of_steps == 3 * ["default"] + 10 * ["error"] + ["default"]
    assert guard.checked == 10 and modes[-1] == "default"


def test_device_figures_of_profiler_events():
    def event(name, us, *, device=DeviceType.CUDA, is_annotation=False):
        time_range = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=is_annotation, time_range=time_range)

    events = [
        *(event("gemm", 100.0) for _ in range(6)),
        *(event("Memcpy HtoD", 50.0), event("Memset (Device)", 10.0)),
        *(event("backward", 900.0, is_annotation=True), event("cudaLaunchKernel", 5.0, device=DeviceType.CPU)),
        *(event("cudaGraphLaunch", 5.0, device=DeviceType.CPU) for _ in range(2)),
    ]
    figures = speed.device_figures(events, steps=2, block_s=0.0012)
    assert figures == {
        "operators_per_step": 3.0,
        "copies_per_step": 1.0,
        "kernels_ms": 0.3,
        "ms_per_step/kernels_ms": 2.0,
        "busy_share": 0.5,
        "graphs_per_step": 1.0,
    }
    assert set(speed.device_figures(events[-1:], steps=2, block_s=1.0).values()) == {None}


def test_comparisons_can_fail(tmp_path):
    for num_ranks in (1, 2):
        directory = tmp_path / f"cache-{num_ranks}"
        directory.mkdir()
        (directory / "spec.json").write_text(json.dumps({"views": 2, "recorded": num_ranks, "checksum": str(num_ranks)}))
        (directory / "train-0.safetensors").write_bytes(b"same")
    finished = {name: [] for name in ("cache-1", "cache-2")}
    assert ranks.compare_caches(finished, tmp_path) == {"ok": True, "files": 2, "differing_files": []}
    (tmp_path / "cache-2/train-0.safetensors").write_bytes(b"sane")
    (tmp_path / "cache-2/train-1.safetensors").write_bytes(b"")
    assert ranks.compare_caches(finished, tmp_path)["differing_files"] == ["train-0.safetensors", "train-1.safetensors"]
    assert relative_difference([1.0, 2.0], [1.0, 4.0]) == 0.5
    with pytest.raises(ValueError, match="longer"):
        relative_difference([1.0], [1.0, 2.0])


@pytest.mark.parametrize(("name", "passing", "failing"), [("float32", 7.0e-7, 9.9e-4), ("tf32", 1.5e-3, 1e-2)])
def test_measured_rounding_passes_and_errors_fail(tmp_path, name, passing, failing):
    """The differences are those that the docstring of losses.py lists; no error in TF32 was measured."""
    for difference in (passing, failing):
        starter = SimpleNamespace(fresh_command=_loss_writer(1 + difference), command=_loss_writer(1 + difference))
        figures = losses.build(Setting(True, tmp_path / str(difference), None), starter)[name]()
        assert figures["ok"] == (difference == passing) and figures["steps"] == 2
        assert figures["largest_relative_difference"] == pytest.approx(difference, rel=1e-3)


def _loss_writer(factor):
    """Return a start of a command that writes losses of a training; those of the CPU are not multiplied by the factor."""

    def start(name, *argv, env=None):
        run_dir = Path(argv[-1].partition("--run_dir=")[2] or argv[-2].partition("--run_dir=")[2])
        run_dir.mkdir(parents=True)
        values = [2.0, 1.5 * (1 if name == "c-cpu" else factor)]
        (run_dir / "metrics.jsonl").write_text("".join(f'{{"split": "train", "loss": {value}}}\n' for value in values))
        return SimpleNamespace(finish=lambda limit_s: "")

    return start


def test_unexpected_exit_code_raises_with_the_output(tmp_path):
    log = tmp_path / "log"
    log.write_text("printed text")
    started = Started("name", 0, log, lambda: 1, lambda: 100.0)
    with pytest.raises(RuntimeError, match="name ended with exit code 1, expected 0\nprinted text"):
        started.finish(1)
    assert started.finish(1, code=1) == "printed text"


def test_faulty_student_injects_nan_in_the_given_step(monkeypatch):
    images, are_finite = torch.rand(4, 3, 32, 32), {}
    for fault in ("logits:2", "gradient:2", ""):
        monkeypatch.setenv("KD_FAULT_NAN_AT", fault)
        network = faulty_student(10).train()
        assert network(images).isfinite().all()
        logits = network(images)
        logits.sum().backward()
        are_finite[fault] = (logits.isfinite().all(1).tolist(), bool(network.fc.weight.grad.isfinite().all()))
    one_is_nan = [position != NAN_POSITION for position in range(4)]
    assert are_finite == {"logits:2": (one_is_nan, True), "gradient:2": ([True] * 4, False), "": ([True] * 4, True)}
