"""Exit codes of the command line, and the paragraph on stderr that explains each.

0 done; 1 a fault of the program (traceback) or of a peer; 2 the user's mistake, one paragraph from one process; 128 + N stopped
by signal N, after a checkpoint.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from kd_accel.errors import PeerLost, Preempted, UserError

_OTHER_RANKS_WAIT_S = 5.0


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn exceptions into messages and exit codes."""
    try:
        processes, _ = _of_launch("WORLD_SIZE", 1, "number of processes"), _of_launch("RANK", 0, "number of a process")
    except UserError as error:
        print(f"kd-accel: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    code = 0
    try:
        yield
    except UserError as error:
        code = 2
        _report_once(str(error))
    except Preempted as stop:
        code = 128 + stop.number
        _print_from_rank_0(str(stop))
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        _print_from_rank_0("stopped by SIGINT; files written so far are complete")
    except PeerLost as lost:  # most likely rank 0 has left with a mistake, and the launcher will end this process
        code = 1
        _wait_for_rank_0()
        print(f"kd-accel: {lost}", file=sys.stderr, flush=True)
    except Exception:
        code = 1
        _wait_for_rank_0()
        if processes == 1:
            raise
        traceback.print_exc()  # not raised: the interpreter's exit may block on NCCL, and the other ranks on this one
    if processes > 1:
        _exit_at_once(code)
    if code:
        raise SystemExit(code)


def _of_launch(variable: str, default: int, meaning: str) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UserError(f"{variable}: {text!r} is not a {meaning}; start with one of the files in launch/, or unset it")
    return int(text)


def _exit_at_once(code: int) -> None:
    """Exit one of several processes without the interpreter's clean-up.

    Threads of the communication library may still run then, and have aborted processes that had done all their work.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report_once(message: str) -> None:
    """Print a mistake from one process: other ranks wait, and rank 0 ends the launch meanwhile if it has the same mistake."""
    _wait_for_rank_0()
    printable = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in message)
    print(f"kd-accel: {printable}", file=sys.stderr, flush=True)  # text from a file must not control the terminal


def _print_from_rank_0(message: str) -> None:
    if not _is_another_rank():
        print(f"kd-accel: {message}", file=sys.stderr, flush=True)


def _wait_for_rank_0() -> None:
    if _is_another_rank():
        time.sleep(_OTHER_RANKS_WAIT_S)


def _is_another_rank() -> bool:
    return int(os.environ.get("RANK", "0")) != 0
