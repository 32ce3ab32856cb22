"""Trainings that are killed or signaled at any instant, and resumed: the result is that of a training never stopped.

Processes are forked from a warm parent; two of them join without a launcher, so that both are killed at once, as by the failure
of a machine. Launchers are tested in test_preemption.py.
"""

import signal
import time

import pytest

from tests.support.holding import wait_until
from tests.support.launching import SMALL, environment, free_port, losses, start
from tests.support.resuming import EVERYTHING, assert_same_run
from tests.support.warm import WarmProcess

pytestmark = pytest.mark.slow

FORTY_STEPS = [
    *EVERYTHING,
    "--model.arch=import:tests.support.models:mortal",
    "--train.epochs=5",
    "--train.max_steps=40",
    "--checkpoint.every_steps=3",
]
"""Forty steps in five epochs, with an evaluation after each epoch and a checkpoint after every three steps."""

KINDS = [(processes, outputs) for processes in (1, 2) for outputs in ("live", "cached")]
QUICK, FULL = 2, 10


class Processes:
    """The processes of one training."""

    def __init__(self, run_dir, flags, *, processes, **changes):
        argv = ["train", f"--run_dir={run_dir}", *SMALL, *flags]
        joined = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
        port = str(free_port())
        self.ranks = [
            WarmProcess(
                argv,
                env=environment(**changes, **(_rank(rank, port, joined) if processes > 1 else {})),
                quiet=processes > 1 and rank > 0,
            )
            for rank in range(processes)
        ]

    def signal(self, number):
        """Send a signal to all ranks at once: each is stopped until all have it, else one would see the end of another."""
        for each in (signal.SIGSTOP, number, signal.SIGCONT):
            for rank in self.ranks:
                rank.send_signal(each)

    def end(self):
        """Wait for all ranks. Returns [exit code of each rank], stderr of rank 0."""
        _, stderr = self.ranks[0].communicate(timeout=240)
        return [rank.wait(timeout=240) for rank in self.ranks], stderr


def _rank(rank, port, joined):
    return {**joined, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}


def finish(run_dir, flags, processes):
    codes, stderr = Processes(run_dir, flags, processes=processes).end()
    assert codes == [0] * processes, stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory, teacher_run):
    """Return {(processes, outputs): (flags of a hybrid distillation, its run that was never stopped, its time in seconds)}."""
    directory = tmp_path_factory.mktemp("straight")
    runs = {}
    for processes, outputs in KINDS:
        flags = [*FORTY_STEPS, f"--teacher.run={teacher_run}", "--distill.temperature={start: 4.0, floor: 2.0, decay: 0.9}"]
        flags.append("--distill.features.mse={weight: 0.1, layers: [layer1, layer2], args: {direction: both, pca_images: 64}}")
        if outputs == "cached":
            flags += ["--teacher.outputs=cached", f"--teacher.cache.dir={directory / 'cache'}", "--teacher.cache.batch_size=16"]
            process = start("cache", "build", *SMALL, *flags)
            assert process.communicate(timeout=240) and process.returncode == 0
        run_dir = directory / f"{processes}-{outputs}"
        started_at = time.monotonic()
        finish(run_dir, flags, processes)
        runs[processes, outputs] = flags, run_dir, time.monotonic() - started_at
    return runs


def stop_at_random(training, run_dir, generator, number, *, length_s):
    """Send a signal, in two of three cases during the steps, and return whether the training had not ended before."""
    if generator.random() < 2 / 3:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists() or training.ranks[0].poll() is not None)
        length_s /= 2
    time.sleep(generator.uniform(0, length_s))
    training.signal(number)
    codes, stderr = training.end()
    assert all(code in (0, -number, 128 + number) for code in codes), stderr
    return any(code != 0 for code in codes)


def stop_and_resume(record, directory, straight, *, kind, number, times):
    """Return the number of trainings that were stopped and resumed, and gave the result of the one never stopped."""
    (processes, outputs), trials = kind, 0
    flags, expected, length_s = straight[kind]
    generator = record.generator("kill", kind, number)
    while trials < times:
        run_dir = directory / f"{number}-{trials}-{generator.random()}"
        training = Processes(run_dir, flags, processes=processes)
        if not stop_at_random(training, run_dir, generator, number, length_s=length_s):
            continue
        trials += 1
        name = signal.Signals(number).name
        with record.trial(f"{name}, {outputs} outputs, {processes} process{'es' if processes > 1 else ''}"):
            finish(run_dir, flags, processes)
            assert_same_run(expected, run_dir)
    return trials


@pytest.mark.proof
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
@pytest.mark.parametrize("times", [QUICK, pytest.param(FULL, marks=pytest.mark.faults)])
def test_kill_9_at_any_instant(tmp_path, fault_record, straight, kind, times):
    assert stop_and_resume(fault_record, tmp_path, straight, kind=kind, number=signal.SIGKILL, times=times) == times


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
@pytest.mark.parametrize("times", [1, pytest.param(FULL, marks=pytest.mark.faults)])
def test_sigterm_at_any_instant(tmp_path, fault_record, straight, kind, times):
    assert stop_and_resume(fault_record, tmp_path, straight, kind=kind, number=signal.SIGTERM, times=times) == times


PLACES = {
    "the first step": ("train:1", 128 + signal.SIGTERM),
    "the last step": ("train:40", 0),
    "an evaluation": ("eval:8", 128 + signal.SIGTERM),
    "the last evaluation": ("eval:40", 0),
    "the evaluation of the results": ("test:40", -signal.SIGTERM),
}
"""Places where the model signals its process, and the exit code after SIGTERM. No checkpoint is due after the last step."""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_stopped_in(tmp_path, fault_record, straight, place, number, processes):
    """The model sends the signal, so the place is exact."""
    flags, expected, _ = straight[processes, "live"]
    with fault_record.trial(f"{number.name} in {place}"):
        at, code = PLACES[place]
        code = code if number == signal.SIGTERM else -number
        changes = {"KD_TEST_AT": at, "KD_TEST_HAPPENS": str(int(number))}
        codes, stderr = Processes(tmp_path / "run", flags, processes=processes, **changes).end()
        # A rank may see the death of its peer before it is at the same place.
        assert code in codes and set(codes) <= ({code, 1} if code < 0 else {code}), stderr
        finish(tmp_path / "run", flags, processes)
        assert_same_run(expected, tmp_path / "run")


@pytest.mark.proof
@pytest.mark.parametrize(
    ("arch", "relative"), [("student", 1e-4), pytest.param("student_float64", 1e-10)], ids=["float32", "float64"]
)
def test_two_processes_then_one_then_two(tmp_path, fault_record, teacher_run, arch, relative):
    """The losses of all sixty steps are equal, for a model without BatchNorm."""
    flags = [f"--model.arch=import:tests.support.models:{arch}", "--train.epochs=8", "--train.max_steps=60"]
    if arch == "student":
        flags += [f"--teacher.run={teacher_run}", "--distill.features.mse={layers: [layer1], args: {pca_images: 64}}"]
    finish(tmp_path / "straight", flags, 2)
    with fault_record.trial("moved from 2 processes to 1 and back"):
        finish(tmp_path / "moved", [*flags, "--checkpoint.stop_after_steps=20"], 2)
        finish(tmp_path / "moved", [*flags, "--checkpoint.stop_after_steps=40"], 1)
        finish(tmp_path / "moved", flags, 2)
        expected = losses(tmp_path / "straight")
        assert len(expected) == 60
        assert losses(tmp_path / "moved") == pytest.approx(expected, rel=relative)


def test_the_comparison_can_fail(tmp_path, straight):
    """Another seed gives another result."""
    flags, expected, _ = straight[1, "live"]
    finish(tmp_path / "run", [*flags, "--seed=1"], 1)
    with pytest.raises(AssertionError):
        assert_same_run(expected, tmp_path / "run")


@pytest.mark.faults
@pytest.mark.parametrize("outputs", ["live", "cached"])
def test_two_thousand_steps_hold_their_memory(tmp_path, fault_record, straight, outputs):
    import psutil

    flags, _, _ = straight[1, outputs]
    flags = [
        *flags,
        "--train.max_steps=2100",
        "--train.epochs=263",
        "--train.log_every_steps=10",
        "--checkpoint.every_steps=100",
    ]
    with fault_record.trial(f"2,000 steps, {outputs} outputs"):
        training = Processes(tmp_path / "run", flags, processes=1)
        process = psutil.Process(training.ranks[0].pid)
        seen = {200: [], 2000: []}
        for line in training.ranks[0].stdout:
            for step, measured in seen.items():
                # A checkpoint, whose file is open while it is written, begins after each hundredth step.
                if any(f"step {step + later}/" in line for later in range(0, 100, 10)):
                    measured.append((process.memory_info().rss, process.num_fds()))
        assert training.end()[0] == [0] and all(len(measured) == 10 for measured in seen.values())
        (early, open_early), (late, open_late) = (map(min, zip(*measured, strict=True)) for measured in seen.values())
        print(f"{outputs}: RSS {early / 2**20:.1f} MiB after step 200, {late / 2**20:.1f} MiB after step 2,000")
        assert late == pytest.approx(early, rel=0.02)
        assert open_late == open_early
