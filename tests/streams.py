"""Streams whose work is done as late as events allow, to see what lacks a wait.

A device may do work in another stream any time later: here it does it when somebody waits for it,
and the main stream runs ahead of all others. What reads a param beside it, without an event between
them, finds what was written to it afterwards.
"""

from __future__ import annotations

import threading

import torch

from fused_ema import _streams


class Late(_streams.Streams):
    """The streams of a device that isn't there: its memory is the host's."""

    def __init__(self):
        self.main = []
        self._done = {id(self.main): 0}
        self._all = [self.main]  # Held: they are known by their ids.
        self._lock = threading.RLock()
        self.may_go_on = threading.Event()  # Closed, it holds whoever waits for an event.
        self.may_go_on.set()
        self.lost = False
        self.is_there = True
        self.num_waits_on_host = 0

    def current(self):
        return self.main

    def make(self):
        stream = []
        self._all.append(stream)
        self._done[id(stream)] = 0
        return stream

    def run(self, stream, work):
        with self._lock:
            stream.append(work)

    def record(self, stream):
        with self._lock:
            return stream, len(stream)

    def wait(self, stream, event):
        self.run(stream, lambda: self._complete(*event))

    def synchronize(self, event):
        self.may_go_on.wait()
        if threading.current_thread() is threading.main_thread():
            self.num_waits_on_host += 1
        if self.lost:
            raise RuntimeError("CUDA error: unspecified launch failure")
        self._complete(*event)

    def is_capturing(self):
        return False

    def drain(self):
        """The main stream gets to the end of all that it was asked for."""
        self._complete(*self.record(self.main))

    def _complete(self, stream, length):
        with self._lock, torch.no_grad():
            while self._done[id(stream)] < length:
                work = stream[self._done[id(stream)]]
                self._done[id(stream)] += 1
                work()
