"""Exit codes of the command line, and the paragraph on stderr that explains each.

0 success; 1 an error of the program (traceback) or the loss of a peer; 2 a mistake of the user; 128 + N stop by signal N, in a
training after a checkpoint.

Of several processes, each also writes its paragraph to the file TORCHELASTIC_ERROR_FILE, which the launcher (`torchrun`,
`accelerate launch`) prints at the end of its summary. A launcher ends all processes as soon as one has failed, so no process
depends on the speed of another one to have its paragraph printed, or to print it only once.
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
_SLOW_STOP_S = 25.0
"""Launchers kill a process 30 seconds after the signal."""

_FORWARDED = frozenset({signal.SIGTERM, signal.SIGINT})
"""The signals that launchers forward."""


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
        # Not raised: the interpreter's exit may wait for NCCL, and the other ranks for this process.
        process.report_cause(traceback.format_exc(), prefix="")
    finally:
        _current = None
    if process.count > 1:
        _exit_at_once(code)
    if code:
        raise SystemExit(code)


def report_lost_peers(message: str) -> None:
    """Print the paragraph of a PeerLost that is about to be raised; without effect outside of `exit_codes`.

    The end of the process may take longer than its launcher waits: it includes a checkpoint that is still being written.
    """
    if _current is not None:
        _current.report_loss(message)


class _Process:
    """One process of a launch, which reports its end at most once.

    A report is a paragraph on stderr and a file for the launcher's summary. The processes of a node agree on what is printed by
    creating files next to those for the launcher.

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
        if self.count > 1 and self._file is not None:
            _watch_signals(self)

    def report_cause(self, text: str, *, prefix: str = "kd-accel: ") -> None:
        """Report a mistake or an error, of which a node prints the first one at once.

        A process with another cause, or on another node, gives its launcher or scheduler time to end it.
        """
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
        """Report the loss of peers, unless a process of this node has reported why it has ended."""
        with self._lock:
            if not self._is_reported and self._claimed("cause") is None:
                self._report(text)

    def report_consequence(self, text: str) -> None:
        """Report the loss of peers if it is not reported yet, because a peer is about to report the cause."""
        if not self._is_reported:
            _wait_for_launcher()
            with self._lock:
                self._report(text)

    def report_stop(self, text: str) -> None:
        """Report a stop that is the same on all ranks."""
        with self._lock:
            self._report(text, is_printed=self._rank == 0)

    def end_by_sigterm(self) -> None:
        """End the process, if its main thread has not begun to; one process of a node reports it, unless the cause is known."""
        with self._lock:
            if not self._is_reported:
                text = (
                    "stopped by SIGTERM, because another process has failed or the launch was stopped. Files written so far "
                    "are complete: run the same command again to continue from them"
                )
                self._report(text, is_printed=self._claimed("cause") is None and self._claim("stop", text))
                os._exit(128 + signal.SIGTERM)

    def warn_of_slow_stop(self) -> None:
        """Report a process that has not ended after a signal; its launcher is about to kill it."""
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
        """Write the file that the launcher prints, in the format of torch.distributed.elastic."""
        if self._file is None:
            return
        # The launcher indents all lines but the first one.
        details = {"py_callstack": f"\n{text.rstrip()}", "timestamp": str(int(time.time()))}
        content = json.dumps({"message": {"message": text, "extraInfo": details}})
        with suppress(OSError):
            replace_whole(self._file, lambda path: path.write_text(content, encoding="utf-8"))

    def _report(self, text: str, *, prefix: str = "kd-accel: ", is_printed: bool = True) -> None:
        self._is_reported = True
        self.write_file(text)
        if is_printed:
            _print(f"{prefix}{text}")

    def _claim(self, name: str, text: str) -> bool:
        """Return whether this process is the first one of its node that claims a name. Without a launcher that is rank 0."""
        if self._file is None:
            return self._rank == 0
        try:
            with self._claim_path(name).open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        except OSError:
            return self._rank == 0
        return True

    def _claimed(self, name: str) -> str | None:
        """Return the text with which a process of this node has claimed a name, None if none has."""
        try:
            return None if self._file is None else self._claim_path(name).read_text(encoding="utf-8")
        except OSError:
            return None

    def _claim_path(self, name: str) -> Path:
        assert self._file is not None
        return self._file.parent.parent / f"kd-accel-{name}-{self._launcher}"


_current: _Process | None = None
"""This process, inside of `exit_codes`."""


def _started_process() -> _Process:
    try:
        return _Process()
    except UserError as error:
        _print(f"kd-accel: {error}")
        raise SystemExit(2) from None


def _of_launch(variable: str, default: int, meaning: str) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"{variable}: {text!r} is not a {meaning}; start with one of the files in launch/, or unset it")
    return int(text)


def _printable(message: str) -> str:
    """Return a message without control characters: a text from a file must not control the terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in message)


def _print(text: str) -> None:
    # In one write: `print` writes the end of the line separately, and lines of several processes would mix.
    sys.stderr.write(f"{text.rstrip()}\n")
    sys.stderr.flush()


def _wait_for_launcher() -> None:
    """Wait, with the default action for SIGTERM: a launcher ends this process as soon as one that reports has ended."""
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_LAUNCHER_WAIT_S)
    signal.signal(signal.SIGTERM, handler)


def _watch_signals(process: _Process) -> None:
    """Start a thread that reports the end by SIGTERM, unless a training handles the signal.

    The main thread runs no Python handler while it is in a call that blocks, as a collective of NCCL.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _leave_to_thread)
    os.register_at_fork(after_in_child=_restore_signals)
    threading.Thread(target=_end_on_signal, args=(process, read_end), daemon=True).start()


def _end_on_signal(process: _Process, read_end: int) -> None:
    slow_at: float | None = None
    while True:
        timeout_s = None if slow_at is None else max(0.0, slow_at - time.monotonic())
        if not select.select([read_end], [], [], timeout_s)[0]:
            process.warn_of_slow_stop()
            slow_at = None
            continue
        received = _FORWARDED.intersection(os.read(read_end, 64))
        if signal.SIGTERM in received and signal.getsignal(signal.SIGTERM) is _leave_to_thread:
            process.end_by_sigterm()
        if received and slow_at is None:
            slow_at = time.monotonic() + _SLOW_STOP_S


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Handle SIGTERM with the thread of `_watch_signals`, to which the interpreter passes the number of each signal."""


def _restore_signals() -> None:
    """Restore the default handling in a forked process, which has no such thread and would write to the pipe of its parent."""
    signal.set_wakeup_fd(-1)
    if signal.getsignal(signal.SIGTERM) is _leave_to_thread:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit_at_once(code: int) -> None:
    """Exit one of several processes without the interpreter's clean-up.

    Threads of the communication library may still run then, and have aborted processes that had done all their work.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
