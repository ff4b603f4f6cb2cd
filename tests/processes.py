"""Work that may end or hang a process, in a copy of this one or in a new one; and in threads."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


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


def pythons(*codes, timeout=60):
    """Runs each code in an interpreter of its own, all at once; any warning there is an error."""
    paths = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for code in codes
    ]
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]


def in_a_process(function, *args):
    """Calls a function of a test file in a new interpreter; returns what it returned, as text."""
    module = function.__module__
    call = f"{module}.{function.__name__}(*{args!r})"
    ((status, stdout, stderr),) = pythons(f"import {module}; print({call}, end='')")
    assert status == 0, stderr
    return stdout


def run_threads(*works, seconds=60):
    """Runs each in a thread; raises what one of them raised, or where one doesn't end."""
    errors = []

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]
