"""Sweeps whose trainings are forks of the sweep, which has imported everything: each training starts seconds earlier."""

import os
import signal
import types

from kd_accel.io import child_process
from tests.support import warm


class ForkedChild:
    """The part of subprocess.Popen that `run_child` uses, for a command of kd_accel without a launcher."""

    def __init__(self, command):
        self.pid = os.fork()
        if self.pid == 0:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_DFL)
            warm._become(command[command.index("kd_accel") + 1 :], dict(os.environ), [])

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _become(argv, environment, ends):
    child_process.subprocess = types.SimpleNamespace(Popen=ForkedChild)
    warm._become(argv, environment, ends)


def start(argv, environment):
    """Start the program in a process with text streams; its children have none."""
    return warm.WarmProcess(argv, env=environment, become=_become)
