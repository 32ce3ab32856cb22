"""Processes forked from one warm interpreter, which has imported everything: each start saves seconds of imports.

The interpreter is the fork server of `multiprocessing`. A forked process has its own environment, streams, signals and exit
code, and runs `kd_accel.cli.main`, as `python -m kd_accel` does.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from unittest import mock

_CONTEXT = multiprocessing.get_context("forkserver")
_LEFT = set()


class WarmProcess:
    """The part of subprocess.Popen that tests use, with text streams. become: function that runs the program in the process."""

    def __init__(self, argv, *, env, quiet=False, become=None):
        self.stdout = self.stderr = None
        ends = []
        if not quiet:
            (out, out_end), (err, err_end) = _CONTEXT.Pipe(duplex=False), _CONTEXT.Pipe(duplex=False)
            self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno()), "r") for reader in (out, err))
            ends = [out_end, err_end]
        self._process = _CONTEXT.Process(target=become or _become, args=([str(argument) for argument in argv], env, ends))
        # Not on import: a forked process imports this module, and may start a fork server of its own.
        _CONTEXT.set_forkserver_preload(["pytest", "tests.support.preloaded"])
        with mock.patch.dict(os.environ, _environment_of_server(), clear=True):
            self._process.start()
        for end in ends:
            end.close()
        _LEFT.add(self._process)

    @property
    def pid(self):
        return self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        _LEFT.discard(self._process)
        return self.returncode

    def communicate(self, timeout=None):
        """Read both streams to their ends, and wait for the exit code."""
        deadline = None if timeout is None else time.monotonic() + timeout
        texts = ["", ""]

        def read(index, stream):
            texts[index] = stream.read()

        streams = enumerate((self.stdout, self.stderr))
        readers = [threading.Thread(target=read, args=(index, stream), daemon=True) for index, stream in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        return tuple(texts)

    def send_signal(self, number):
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start_server():
    """Start the fork server, and wait for its imports: the first process would wait for them."""
    WarmProcess(["--version"], env=dict(os.environ), quiet=True).wait()


@atexit.register
def _kill_left():
    """Kill the processes that a failed test has left: `multiprocessing` would wait for them."""
    for process in _LEFT:
        process.kill()


def _environment_of_server():
    """Return the variables of the server, which the first process starts: they count while it imports."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_", "KD_"))}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}


def _become(argv, environment, ends):
    """Run the program in the forked process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for a command in the background
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    null = os.open(os.devnull, os.O_WRONLY)
    for target, end in zip((1, 2), [end.fileno() for end in ends] or [null, null], strict=True):
        os.dup2(end, target)
    for end in ends:
        end.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["kd_accel", *argv]
    os._exit(_ended())


def _ended():
    """Run the program. Returns the exit code of an interpreter that had run it alone."""
    from kd_accel.cli import main

    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code
