"""Exit codes of the command line, and the paragraph on stderr that explains each.

Codes: 0 success; 1 an error of the program, with a traceback, or the loss of a peer; 2 a mistake of the user; 128 + N stop by
signal N, in a training after a checkpoint.

A launcher (`torchrun`, `accelerate launch`) prints a long summary of its own below the paragraph, so the paragraph is also
written to the file that the launcher quotes in this summary, TORCHELASTIC_ERROR_FILE. A launcher ends all processes as soon as
one has failed. Which process that is depends on the timing; what is printed must not.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from kd_accel.errors import OutputClosed, PeerLost, Preempted, UserError
from kd_accel.io.files import replace_whole

_LAUNCHER_WAIT_S = 5.0
"""Time in which a launcher ends a process after another one has failed."""

_SLOW_STOP_S = 25.0
"""Time from a signal to the report that the process has not stopped. Launchers kill a process after 30 seconds."""

_FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT})
"""Signals that launchers forward to their processes."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn exceptions into messages and exit codes."""
    global _current
    process = _current = _started_process()
    code = 0
    try:
        yield
    except UserError as error:
        code = 2
        process.report_cause(_printable(str(error)))
    except Preempted as stop:
        code = 128 + stop.number
        process.report_stop(str(stop))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        process.report_stop("stopped by SIGINT; files written so far are complete")
    except OutputClosed:
        code = 128 + signal.SIGPIPE
    except PeerLost as lost:
        code = 1
        process.report_consequence(str(lost))
    except Exception:
        code = 1
        if process.count == 1:
            process.write_file(traceback.format_exc())
            raise
        # Not raised again: the interpreter's exit may wait for NCCL, and the other ranks for this process.
        process.report_cause(traceback.format_exc(), prefix="")
    finally:
        _current = None
    if process.count > 1:
        _exit_at_once(code)
    if code:
        raise SystemExit(code)


def report_lost_peers(message: str) -> None:
    """Print the message of a PeerLost that is about to be raised. This has no effect outside of `exit_codes`.

    `exit_codes` may receive the exception too late: until then a checkpoint is written and the tracker is closed, and the
    launcher kills the process 30 seconds after the death of its peer.
    """
    if _current is not None:
        _current.report_loss(message)


class _Process:
    """One process of a launch, which reports at most once why it ends.

    A report is a paragraph on stderr and a file for the launcher's summary. Of the processes of a node, the first one to create
    a certain file next to the launcher's files prints the paragraph.

    Raises:
        UserError: If the variables of the launch are not valid.
    """

    def __init__(self) -> None:
        self.count = _of_launch("WORLD_SIZE", 1, "number of processes")
        self._rank = _of_launch("RANK", 0, "number of a process")
        self._node = _of_launch("GROUP_RANK", 0, "number of a node")
        file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or os.devnull)
        # A path that exists and is not a regular file must not be replaced: as root, that would remove /dev/null.
        self._file = None if file.exists() and not file.is_file() else file
        self._launcher = os.getppid()
        self._lock = threading.Lock()
        self._is_reported = False
        self._is_handled = threading.Event()

    @property
    def has_launcher(self) -> bool:
        """Existence of a launcher that has started this process and quotes its report."""
        return self._file is not None

    def report_cause(self, text: str, *, prefix: str = "kd-accel: ") -> None:
        """Report a mistake or an error.

        The first process of node 0 prints it at once. The other processes leave their launcher or scheduler the time to end
        them, and then print what differs from the first one's.
        """
        if self._is_reported:  # an error in the clean-up after the loss of peers
            return
        if self._node > 0:
            _wait_for_launcher()
        with self._lock:
            if self._claim("cause", text):
                self._report(text, prefix=prefix)
                return
        _wait_for_launcher()
        with self._lock:
            self._report(text, prefix=prefix, is_printed=self._claimed("cause") != text)

    def report_loss(self, text: str) -> None:
        """Report the loss of peers, unless a process of this node has reported a cause."""
        with self._lock:
            if not self._is_reported and self._claimed("cause") is None:
                self._report(text)

    def report_consequence(self, text: str) -> None:
        """Report the loss of peers, if it was not reported before because another process reports the cause."""
        if not self._is_reported:
            _wait_for_launcher()
            with self._lock:
                self._report(text)

    def report_stop(self, text: str) -> None:
        """Report a stop that is the same on all ranks."""
        with self._lock:
            self._report(text, is_printed=self._rank == 0)

    def leave_to_thread(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM in the main thread: wait until the other thread has handled it.

        Otherwise the main thread could report an error first, because the signal has also ended its workers.
        """
        deadline = time.monotonic() + _LAUNCHER_WAIT_S
        while not self._lock.locked() and not self._is_handled.is_set() and time.monotonic() < deadline:
            with suppress(Exception):  # the error of torch's handler for SIGCHLD
                self._is_handled.wait(_LAUNCHER_WAIT_S)

    def handle_sigterm(self) -> None:
        """End the process, unless a training handles the signal or the main thread has reported why it ends."""
        if signal.getsignal(signal.SIGTERM) == self.leave_to_thread:
            self._end_by_sigterm()
        self._is_handled.set()

    def restore_signals(self) -> None:
        """Restore the default handling in a forked process: it lacks the thread, and shares the pipe to its parent's thread."""
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) == self.leave_to_thread:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def warn_of_slow_stop(self) -> None:
        """Report that the process has not ended after a signal, shortly before its launcher kills it."""
        with self._lock:
            if not self._is_reported:
                text = (
                    f"rank {self._rank} of {self.count} has not stopped within {_SLOW_STOP_S:.0f} s of the signal: it waits "
                    "for a peer that has died or does not respond, or a step or a checkpoint takes longer. The last written "
                    "files are complete: run the same command again to resume from them"
                )
                self.write_file(text)
                _print(f"kd-accel: {text}")

    def write_file(self, text: str) -> None:
        """Write the file that the launcher quotes, in the format of torch.distributed.elastic.multiprocessing.errors."""
        if self._file is None:
            return
        # The launcher prints the first line after "traceback : ", and the next ones below it.
        details = {"py_callstack": f"\n{text.rstrip()}", "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": text, "extraInfo": details}})
        with suppress(OSError):
            replace_whole(self._file, lambda path: path.write_text(content, encoding="utf-8"))

    def _end_by_sigterm(self) -> None:
        """Report and end the process. One process of a node prints the report, unless a cause is printed."""
        with self._lock:
            if not self._is_reported:
                text = (
                    "stopped by SIGTERM, because another process has failed or the launch was stopped. Files written so far "
                    "are complete: run the same command again to continue from them"
                )
                self._report(text, is_printed=self._claimed("cause") is None and self._claim("stop", text))
                os._exit(128 + signal.SIGTERM)

    def _report(self, text: str, *, prefix: str = "kd-accel: ", is_printed: bool = True) -> None:
        self._is_reported = True
        self.write_file(text)
        if is_printed:
            _print(f"{prefix}{text}")

    def _claim(self, name: str, text: str) -> bool:
        """Return whether this process is the first one of its node to claim a name. Without a launcher that is rank 0."""
        if self._file is None:
            return self._rank == 0
        try:
            with self._claim_path(name).open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError:
            return self._rank == 0
        return True

    def _claimed(self, name: str) -> str | None:
        """Return the text with which a process of this node has claimed a name, or None."""
        try:
            return None if self._file is None else self._claim_path(name).read_text(encoding="utf-8")
        except OSError:
            return None

    def _claim_path(self, name: str) -> Path:
        assert self._file is not None
        return self._file.parent.parent / f"kd-accel-{name}-{self._launcher}"


_current: _Process | None = None
"""This process; None outside of `exit_codes`."""


def _started_process() -> _Process:
    try:
        process = _Process()
    except UserError as error:
        _print(f"kd-accel: {error}")
        raise SystemExit(2) from None
    if process.count > 1 and process.has_launcher:
        _start_signal_thread(process)
    return process


def _of_launch(variable: str, default: int, meaning: str) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"{variable}: {text!r} is not a {meaning}; start with one of the files in launch/, or unset it")
    return int(text)


def _printable(message: str) -> str:
    """Return a message with its control characters escaped: text from a file must not control the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in message)


def _print(text: str) -> None:
    # `print` writes the end of the line separately, so that the lines of several processes could mix.
    sys.stderr.write(f"{text.rstrip()}\n")
    sys.stderr.flush()


def _wait_for_launcher() -> None:
    """Wait for the SIGTERM of the launcher, which ends this process silently."""
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LAUNCHER_WAIT_S)
    signal.signal(signal.SIGTERM, handler)


def _start_signal_thread(process: _Process) -> None:
    """Start a thread that handles SIGTERM outside of a training's steps.

    A Python handler would not do: the main thread runs it only between bytecodes, not during a collective that blocks.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, process.leave_to_thread)
    os.register_at_fork(after_in_child=process.restore_signals)
    threading.Thread(target=_handle_signals, args=(process, read_end), daemon=True).start()


def _handle_signals(process: _Process, read_end: int) -> None:
    slow_at: float | None = None
    while True:
        timeout_s = None if slow_at is None else max(0.0, slow_at - time.monotonic())
        if not select.select([read_end], [], [], timeout_s)[0]:
            process.warn_of_slow_stop()
            slow_at = None
            continue
        received = _FORWARDED.intersection(os.read(read_end, 64))
        if signal.SIGTERM in received:
            process.handle_sigterm()
        if received and slow_at is None:
            slow_at = time.monotonic() + _SLOW_STOP_S


def _exit_at_once(code: int) -> None:
    """Exit one of several processes without the interpreter's clean-up.

    Threads of the communication library may still run then, and have aborted processes that had done all their work.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
