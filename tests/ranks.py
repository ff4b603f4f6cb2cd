"""Processes that are the ranks of a group and run the functions of a test, each the same one."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import tempfile
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist

_SECONDS = 240


def _serve(rank, world, store, pipe):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Torch's, of what these models do.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_SECONDS),
    )
    parent = os.getppid()
    while (call := _next(pipe, parent)) is not None:
        work, args = call
        try:
            work(*args)
            pipe.send("")
        except BaseException:
            pipe.send(traceback.format_exc())
    dist.destroy_process_group()


def _next(pipe, parent):
    while not pipe.poll(2):
        if os.getppid() != parent:  # The tests were killed.
            os._exit(1)
    return pipe.recv()


class Ranks:
    """Some processes; started anew after a test that failed or hung in one of them."""

    def __init__(self, world):
        self.world = world
        self._processes = []

    def __call__(self, work, *args):
        """Runs a function of a module on all ranks; fails with what was raised on any."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((work, args))
        outcomes = self._outcomes()
        if any(outcomes):
            self.stop(by_force=True)
        assert not any(outcomes), "\n".join(
            f"rank {rank}: {text}" for rank, text in enumerate(outcomes) if text
        )

    def _start(self):
        # A fork has everything imported; where CUDA is at work it can't run a backward.
        method = "spawn" if torch.cuda.is_available() else "fork"
        context = multiprocessing.get_context(method)
        folder = tempfile.mkdtemp()
        self._pipes = []
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, f"{folder}/store", theirs), daemon=True
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This process .* is multi-threaded", Warning)
                process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _outcomes(self):
        outcomes = dict.fromkeys(range(self.world), "it didn't end")
        left = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        seconds = _SECONDS
        while left and (ready := multiprocessing.connection.wait(left, seconds)):
            for pipe in ready:
                try:
                    text = pipe.recv()
                except EOFError:
                    text = "it ended"
                outcomes[left.pop(pipe)] = text
                if text:  # The others may wait for it.
                    seconds = 5
        return list(outcomes.values())

    def stop(self, by_force=False):
        for process, pipe in zip(
            self._processes, self._pipes if self._processes else (), strict=True
        ):
            if by_force:
                process.kill()
            else:
                pipe.send(None)
            process.join()
        self._processes = []
