"""Processes of the acceptance test: forked from a server that has imported all modules, each with a log and a time limit.

Importing torch and kd_accel takes five seconds or more. The fork server of multiprocessing imports them once, never uses the
GPU, and forks for each process. If a forked process cannot use the GPU, all processes are spawned instead.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PRELOADED = [
    *(f"benchmarks.acceptance.{name}" for name in ("guard", "steps", "speed", "agreement", "nccl", "ranks", "runs")),
    *("kd_accel.cli", "kd_accel.builders.results", "kd_accel.builders.cache_build"),
]
_POLL_S = 0.02
_TAIL = 1500
BUDGET = "budget"
"""Reason of a case that was not run for lack of time."""
_LOCK = threading.Lock()
"""Held during all calls of multiprocessing, which polls every process from each thread that starts one."""


class NotRun(Exception):  # noqa: N818  (not an error)
    """Signal that a case is not run; its message is the reason."""


@dataclass(frozen=True)
class Started:
    """Process that was started.

    Args:
        name: Name of the process, for messages.
        pid: Id of the process and of its group.
        log: File of its output.
        poll: Function that returns the exit code, None while the process runs.
        budget_left_s: Function that returns the rest of the budget in seconds.
    """

    name: str
    pid: int
    log: Path
    poll: Callable[[], int | None]
    budget_left_s: Callable[[], float]

    def wait(self, limit_s: float, *, progress: Callable[[], object] = lambda: None) -> int:
        """Wait for the end of the process, and kill it at the limit.

        Args:
            limit_s: Longest time in seconds without a change of `progress()`.
            progress: Function whose value changes while the process makes progress.

        Returns:
            The exit code; -N if the process was killed by signal N.

        Raises:
            TimeoutError: If the limit was reached.
            NotRun: If the budget has ended.
        """
        last, ends_at = progress(), time.monotonic() + limit_s
        while (code := self.poll()) is None:
            if (current := progress()) != last:
                last, ends_at = current, time.monotonic() + limit_s
            if self.budget_left_s() <= 0:
                self.kill()
                raise NotRun(BUDGET)
            if time.monotonic() > ends_at:
                self.kill()
                raise TimeoutError(f"{self.name} did not end within {limit_s:.0f} s\n{self.tail}")
            time.sleep(_POLL_S)
        return code

    def finish(self, limit_s: float, *, code: int = 0) -> str:
        """Wait for the end of the process and return its output.

        Args:
            limit_s: Time limit in seconds.
            code: Expected exit code.

        Raises:
            RuntimeError: If the process ends with another exit code.
            TimeoutError: If the limit was reached.
            NotRun: If the budget has ended.
        """
        actual = self.wait(limit_s)
        if actual != code:
            raise RuntimeError(f"{self.name} ended with exit code {actual}, expected {code}\n{self.tail}")
        return self.printed

    @property
    def printed(self) -> str:
        """Return the output of the process."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def tail(self) -> str:
        """Return the end of the output."""
        return self.printed[-_TAIL:].strip()

    def kill(self) -> None:
        """Kill the process and all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                # A forked process has no group until it has called setsid.
                os.kill(self.pid, signal.SIGKILL)


class Starter:
    """Starter of processes within a time budget; a context manager that kills the running processes on exit.

    Args:
        logs: Directory of the logs, one file for each process.
        budget_s: Time from now until the end of the budget, in seconds.
    """

    def __init__(self, logs: Path, *, budget_s: float) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._ends_at = logs, time.monotonic() + budget_s
        self._started: list[Started] = []
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        # Started now, so that its imports run at the same time as those of this process.
        forkserver.ensure_running()

    @property
    def left_s(self) -> float:
        """Return the rest of the budget in seconds."""
        return self._ends_at - time.monotonic()

    def end_budget(self) -> None:
        """End the budget now: running processes are killed, and the remaining cases are not run."""
        self._ends_at = time.monotonic()

    def __enter__(self) -> Starter:
        return self

    def __exit__(self, *about: object) -> None:
        self.kill_running()

    def kill_running(self) -> None:
        """Kill all processes that still run."""
        for started in self._started:
            if started.poll() is None:
                started.kill()

    def choose_method(self) -> str:
        """Choose how processes are started: `forkserver`, or `spawn` if a forked process cannot use the device."""
        probe = self.start("probe", use_device)
        try:
            probe.finish(120)
        except (RuntimeError, TimeoutError, NotRun):
            self._context = multiprocessing.get_context("spawn")
        return self._context.get_start_method()

    def start(
        self, name: str, function: Callable[..., None], *arguments: object, env: Mapping[str, str] | None = None
    ) -> Started:
        """Call a function in a new process; function and arguments must be picklable."""
        log = self._logs / f"{name}.log"
        process = self._context.Process(target=_enter, args=(log, dict(env or {}), function, *arguments), name=name)
        with _LOCK:
            process.start()

        def poll() -> int | None:
            with _LOCK:
                return process.exitcode

        return self._added(name, process.pid, log, poll)

    def command(self, name: str, *argv: object, env: Mapping[str, str] | None = None) -> Started:
        """Start `python -m kd_accel` with these arguments."""
        return self.start(name, run_command, list(map(str, argv)), env=env)

    def fresh_command(self, name: str, *argv: object, env: Mapping[str, str]) -> Started:
        """Start the same command in a new interpreter, for environment variables that libraries read when they are loaded."""
        log = self._logs / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "kd_accel", *map(str, argv)],
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self._added(name, process.pid, log, process.poll)

    def _added(self, name: str, pid: int, log: Path, poll: Callable[[], int | None]) -> Started:
        started = Started(name, pid, log, poll, lambda: self.left_s)
        self._started.append(started)
        return started


def run_command(argv: list[str]) -> None:
    """Run a command line of the program."""
    from kd_accel.cli import main

    main(argv)


def use_device() -> None:
    """Compute a matrix product on the device, the GPU if there is one."""
    import torch

    ones = torch.ones(4, 4, device="cuda" if torch.cuda.is_available() else "cpu")
    assert (ones @ ones).sum().item() == 64


def launch_environment(world_size: int) -> list[dict[str, str]]:
    """Return the environment variables of each rank of a launch on this machine; all ranks use the first device."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} for rank in range(world_size)]


def _enter(log: Path, env: Mapping[str, str], function: Callable[..., None], *arguments: object) -> None:
    """Call a function in the new process, with its output redirected to a log."""
    # A process group, so that the process can be killed together with all processes that it starts.
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(env)
    function(*arguments)
