"""Processes forked from one warm parent, which has imported everything: each start saves seconds of imports.

A forked process is like any other: its own environment, files, signals, exit code; it runs `kd_accel.cli.main`, as
`python -m kd_accel` does. The parent never computes, so that it has no threads, which a fork would lose.

    python -m tests.support.warm SOCKET    serves until its standard input ends; each connection requests one process
"""

import array
import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


class WarmProcess:
    """The part of subprocess.Popen that tests use; text streams."""

    def __init__(self, argv, *, env, quiet=False):
        self.returncode = None
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(_parent())
        streams, ends = ([None, None], [os.open(os.devnull, os.O_WRONLY)] * 2) if quiet else _pipes()
        self.stdout, self.stderr = streams
        request = json.dumps({"argv": [str(argument) for argument in argv], "env": env}).encode()
        self._connection.sendall(len(request).to_bytes(8, "big"))
        socket.send_fds(self._connection, [request[:1]], ends)
        self._connection.sendall(request[1:])
        for end in set(ends):
            os.close(end)
        self._replies = self._connection.makefile("r")
        self.pid = int(self._replies.readline())

    def poll(self):
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = int(self._replies.readline())
            self._connection.close()
        return self.returncode

    def communicate(self, timeout=None):
        deadline = None if timeout is None else time.monotonic() + timeout
        texts = ["", ""]

        def read(index, stream):
            texts[index] = stream.read()

        readers = [
            threading.Thread(target=read, args=(index, stream), daemon=True)
            for index, stream in enumerate((self.stdout, self.stderr))
        ]
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


def _pipes():
    pairs = [os.pipe(), os.pipe()]
    return [os.fdopen(read_end, "r") for read_end, _ in pairs], [write_end for _, write_end in pairs]


@functools.cache
def _parent():
    """Start the parent, once per session. Returns the path of its socket."""
    path = Path(tempfile.mkdtemp(prefix="kd-warm-")) / "socket"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "WANDB_", "KD_"))}
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.support.warm", str(path)],
        cwd=ROOT,
        env={**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"},
        stdin=subprocess.PIPE,
    )
    atexit.register(_end, parent, path)
    while not path.exists():
        assert parent.poll() is None, "the warm parent has not started"
        time.sleep(0.01)
    return str(path)


def _end(parent, path):
    parent.stdin.close()
    parent.wait(timeout=60)
    path.unlink(missing_ok=True)
    path.parent.rmdir()


def serve(path):
    """Fork for each connection, until standard input ends."""
    import_everything()
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) == 1, f"a fork would lose threads: {threads}"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: nothing waits for the keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which end this process
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(f"{path}.new")
    server.listen(64)
    Path(f"{path}.new").rename(path)
    while True:
        ready, _, _ = select.select([server, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = server.accept()
        if os.fork() == 0:
            server.close()
            keep(connection)
        connection.close()


def keep(connection):
    """In a process of its own: fork the requested process, send its id, wait for its end, send its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    first, ends, _, _ = socket.recv_fds(connection, 1, 2)
    request = json.loads(first + connection.recv(length - 1, socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(request, array.array("i", ends))
    for end in set(ends):
        os.close(end)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # the test may have ended
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(request, ends):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, end in zip((1, 2), ends, strict=True):
        os.dup2(end, target)
    for end in set(ends):
        os.close(end)
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["kd_accel", *request["argv"]]
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


def import_everything():
    """Import what commands import when they are called, so that no forked process has to."""
    import importlib
    import pkgutil

    import kd_accel

    for module in pkgutil.walk_packages(kd_accel.__path__, "kd_accel."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("datasets", "sklearn.datasets", "torchvision.models", "wandb", "PIL.Image", "torch._dynamo"):
        importlib.import_module(name)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
