"""Processes of an acceptance: forked from one that has imported everything, each with its own log and deadline.

torch and this program take five seconds and more to import, so an interpreter that has imported them once (multiprocessing's
fork server, which never touches the GPU) forks for each start. If a forked process cannot use the GPU, all are started from
scratch.
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
"""Reason of a case that was left out for lack of time."""
_LOCK = threading.Lock()
"""Held around all calls of multiprocessing: it polls every process from any thread that starts one."""


class NotRun(Exception):  # noqa: N818  (no error)
    """Reason why a case was left out."""


@dataclass(frozen=True)
class Started:
    """Started process.

    Args:
        name: of the process.
        pid: of the process, also of its group.
        log: file of its output.
        poll: returns the exit code, None while it runs.
        budget_left_s: returns the rest of the time for everything, in seconds.
    """

    name: str
    pid: int
    log: Path
    poll: Callable[[], int | None]
    budget_left_s: Callable[[], float]

    def wait(self, limit_s: float, *, progress: Callable[[], object] = lambda: None) -> int:
        """Wait for the end of the process, and kill it at the limit.

        Args:
            limit_s: seconds since the last change of `progress()`.
            progress: returns a value that changes while the process makes progress.

        Returns:
            The exit code; negative = killed by that signal.

        Raises:
            TimeoutError: the limit was reached.
            NotRun: the budget has ended.
        """
        seen, ends_at = progress(), time.monotonic() + limit_s
        while (code := self.poll()) is None:
            if (now := progress()) != seen:
                seen, ends_at = now, time.monotonic() + limit_s
            if self.budget_left_s() <= 0:
                self.kill()
                raise NotRun(BUDGET)
            if time.monotonic() > ends_at:
                self.kill()
                raise TimeoutError(f"{self.name} has not ended within {limit_s:.0f} s\n{self.tail}")
            time.sleep(_POLL_S)
        return code

    def finish(self, limit_s: float, *, code: int = 0) -> str:
        """Wait for this exit code and return the output of the process. Raises RuntimeError for another code."""
        found = self.wait(limit_s)
        if found != code:
            raise RuntimeError(f"{self.name} ended with {found}, not {code}\n{self.tail}")
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
        """Kill the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has no group of its own yet
                os.kill(self.pid, signal.SIGKILL)


class Starter:
    """Starter of processes; on leaving its context it kills those that still run.

    Args:
        logs: directory, one file for each process.
        budget_s: time for everything, from now on.
    """

    def __init__(self, logs: Path, *, budget_s: float) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._ends_at = logs, time.monotonic() + budget_s
        self._started: list[Started] = []
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()  # it imports while this process does

    @property
    def left_s(self) -> float:
        """Return what is left of the budget, in seconds."""
        return self._ends_at - time.monotonic()

    def end_budget(self) -> None:
        """End the budget now: what has not been run is left out, and running processes are killed."""
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
        """Return `forkserver`, or `spawn` where the device cannot be used in a forked process; start all others so."""
        probe = self.start("probe", use_device)
        try:
            probe.finish(120)
        except (RuntimeError, TimeoutError, NotRun):
            self._context = multiprocessing.get_context("spawn")
        return self._context.get_start_method()

    def start(
        self, name: str, function: Callable[..., None], *arguments: object, env: Mapping[str, str] | None = None
    ) -> Started:
        """Call a function that can be pickled in a process of its own."""
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
        """Start it in a new interpreter, for variables that libraries read while they are loaded."""
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
    """Compute something on the device of this machine."""
    import torch

    ones = torch.ones(4, 4, device="cuda" if torch.cuda.is_available() else "cpu")
    assert (ones @ ones).sum().item() == 64


def launch_environment(world_size: int) -> list[dict[str, str]]:
    """Return the variables that a launcher sets, by rank; all ranks share the first device of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"} for rank in range(world_size)]


def _enter(log: Path, env: Mapping[str, str], function: Callable[..., None], *arguments: object) -> None:
    """Run in the new process, in a group of its own, so that it can be killed with all that it started."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(env)
    function(*arguments)
