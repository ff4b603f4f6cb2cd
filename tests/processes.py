"""Work that may end or hang a process, in a copy of this one."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
import warnings

import torch


class Fork:
    """A copy of this process that does some work; killed when it takes longer than `seconds`."""

    def __init__(self, work, seconds):
        read, write = os.pipe()
        with warnings.catch_warnings():
            # From Python 3.12 on, where there are threads: OpenMP's, which wait for work.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", Warning)
            self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            faulthandler.disable()  # How a fork ends is for the test to say.
            torch.set_num_threads(1)  # In a fork OpenMP has lost the threads that it counts on.
            try:
                text = str(work())
            except BaseException:
                text = traceback.format_exc()
            os.write(write, text.encode())
            os._exit(0)
        os.close(write)
        self.read = read

    def outcome(self):
        """What the work returned, as text, or what ended it."""
        with os.fdopen(self.read, "rb") as pipe:
            text = pipe.read().decode()
        _, status = os.waitpid(self.pid, 0)
        return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else text


def forked(work, *args, seconds=60):
    return Fork(lambda: work(*args), seconds).outcome()
