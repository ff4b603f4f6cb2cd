"""A host ema: averages in the host's memory whose params are on a device.

An update goes through buffers of a bounded size, chunk by chunk, on a thread and on streams of its
own. Either the device averages, and the ema's bytes cross the link there and back; or the host's
kernels do, and the params' bytes cross it once.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fused_ema import _checks, _foreach, _native, _slots, _storage, _streams, ops
from fused_ema._chunks import Chunk, Item, as_moved, lay
from fused_ema._foreach import DTYPE_PAIRS, EXCHANGE_PAIRS
from fused_ema._slots import Slot, Tracked
from fused_ema.ops import Form

AveragedOn = Literal["auto", "host", "device"]
"""Where the arithmetic of a host ema is done."""

_TITLE = "fused_ema.EMAManager"
_MB = 1 << 20
# Measured on an H200 (docs/offload.md): with three buffers of 4 MB both ways of the link are busy.
_NUM_BUFFERS = 3
_MOST_CHUNK_BYTES = 4 * _MB
# A chunk of more pieces is gathered on the device, to cross the link in one copy.
_MOST_COPIES = 4
# Of the shortest chunk: an aligned part of the widest tensor.
_LEAST_CHUNK_BYTES = 256
_PATIENCE_SECONDS = 1.0


def parse(
    device: torch.device | None,
    staging_mb: float,
    averaged_on: str,
    num_averages: int,
    is_plain: bool,
) -> Offload | None:
    """Of what EMAManager is given; None where the emas aren't to be in the host's memory.

    Args:
        device: Of the emas.
        staging_mb: For buffers.
        averaged_on: Where.
        num_averages: That are kept.
        is_plain: Whether nothing else than updates reads the params.

    Raises:
        TypeError: ``staging_mb`` is no number.
        ValueError: Too little staging, or an unknown way.
    """
    staging_bytes = _checks.number("EMAManager", "staging_mb", staging_mb) * _MB
    least = _NUM_BUFFERS * _LEAST_CHUNK_BYTES * num_averages
    if not least <= staging_bytes < float("inf"):
        raise ValueError(
            f"{_TITLE}: staging_mb is {staging_mb}; {_NUM_BUFFERS} buffers of an aligned part of "
            f"a tensor{f' for {num_averages} averages' if num_averages > 1 else ''} need at least "
            f"{least} bytes ({least / _MB:.2g}); the default is 12"
        )
    if averaged_on not in get_args(AveragedOn):
        raise ValueError(
            f"{_TITLE}: averaged_on is {averaged_on!r}; choose 'auto', 'host' or 'device'"
        )
    if device is None or device.type != "cpu" or not is_plain:
        return None
    return Offload(int(staging_bytes), averaged_on, num_averages)


class _Staging:
    """Buffers for one device, its streams, and what they are asked for."""

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        self.streams = _streams.of(device)
        self._device = device
        self.chunk_bytes = chunk_bytes_of(staging_bytes)
        self.num_buffers = staging_bytes // self.chunk_bytes
        self.down, self.work, self.up = (self.streams.make() for _ in range(3))
        self._staging_bytes = staging_bytes
        self._on_host: Tensor | None = None
        self._on_device: list[Tensor] = []

    def on_host(self) -> _Ring:
        """The host's memory, pinned where it can be, free for a way through it."""
        if self._on_host is None:
            self._on_host, _ = pinned_or_not(self._staging_bytes, torch.uint8)
        return _Ring(self._on_host)

    def on_device(self, index: int) -> Tensor:
        """A buffer on the device."""
        while len(self._on_device) <= index:
            with torch.inference_mode(False):
                made = torch.empty(self.chunk_bytes, dtype=torch.uint8, device=self._device)
            # Who had this memory before may use it in the stream that it was made in.
            event = self.streams.record(self.streams.current())
            for stream in (self.down, self.work, self.up):
                self.streams.wait(stream, event)
            self._on_device.append(made)
        return self._on_device[index]

    def copy(self, stream: Any, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copies pairs of one dtype each over the link, in a stream."""

        def work() -> None:
            for dst, src in pairs:
                dst.copy_(src, non_blocking=self.streams.is_asynchronous)

        self.streams.run(stream, work)


class _Ring:
    """Memory that is handed out in turn, and given back in the same order."""

    def __init__(self, memory: Tensor) -> None:
        self._memory = memory
        self._next = 0
        self._used: deque[tuple[int, int]] = deque()

    def take(self, num_bytes: int, free: Callable[[], None]) -> Tensor:
        """Some of it; free() is called as often as needed, and calls give_back()."""
        begin = self._next if self._next + num_bytes <= len(self._memory) else 0
        while any(a < begin + num_bytes and begin < b for a, b in self._used):
            free()
        self._used.append((begin, begin + num_bytes))
        step = _storage.ALIGNMENT_BYTES
        self._next = (begin + num_bytes + step - 1) // step * step
        return self._memory[begin : begin + num_bytes]

    def give_back(self) -> None:
        """The part that was handed out first."""
        self._used.popleft()


def chunk_bytes_of(staging_bytes: int) -> int:
    """The size of a buffer, of which there are at least three."""
    return min(staging_bytes // _NUM_BUFFERS, _MOST_CHUNK_BYTES)


def pinned_or_not(size: int, dtype: torch.dtype) -> tuple[Tensor, str]:
    """Memory of the host, pinned where it can be; else why it isn't."""
    with torch.inference_mode(False):
        try:
            return torch.empty(size, dtype=dtype, device="cpu", pin_memory=True), ""
        except (RuntimeError, NotImplementedError) as error:
            why = str(error).partition("\n")[0]
            return torch.empty(size, dtype=dtype, device="cpu"), why


@dataclass(eq=False)
class _Layout:
    """Chunks of the tensors that there were."""

    keys: list[tuple[object, ...]]
    emas: list[Sequence[Tensor]]
    """Held, since the keys have their ids."""
    chunks: list[Chunk]


@dataclass(eq=False)
class _Job:
    """One update.

    Attributes:
        title: What it is, for an error.
        items: What is updated, with the params that there are now.
        chunks: Of these.
        momenta: One for each average; None to copy.
        form: As the manager's.
        ready: By device, when the params have their new values.
        prompt_read, read: By device, when the prompt params have been read, and when all have.
        prompt_asked, asked: Set once those events are there.
        done: Set once the averages are, or an error is.
        applied: Chunks that are done.
        in_flight: Those that were asked for, of which it can't be told.
        error: What went wrong.
    """

    title: str
    items: Sequence[Item]
    chunks: Sequence[Chunk]
    momenta: Sequence[float] | None
    form: Form
    ready: dict[torch.device, Any]
    prompt_read: dict[torch.device, list[Any]] = field(default_factory=dict)
    read: dict[torch.device, list[Any]] = field(default_factory=dict)
    prompt_asked: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    applied: list[Chunk] = field(default_factory=list)
    in_flight: list[Chunk] = field(default_factory=list)
    error: BaseException | None = None

    def outcome(self) -> str:
        """What became of each average, where there was an error."""
        counts = [0] * len(self.items)
        flying = set()
        for chunk in self.applied:
            for piece in chunk.pieces:
                counts[piece.index] += piece.numel
        for chunk in self.in_flight:
            flying |= {piece.index for piece in chunk.pieces}
        sizes = [item.numel for item in self.items]
        moved = [i for i, n in enumerate(counts) if n == sizes[i] and i not in flying]
        half = [i for i, n in enumerate(counts) if 0 < n < sizes[i] and i not in flying]
        text = f"Of {len(self.items)} averages {len(moved)} have moved"
        for what, indices in (
            ("half done is", half),
            ("which of these have moved or are half done can't be told:", sorted(flying)),
        ):
            if indices:
                names = [self.items[i].name for i in indices]
                text += f", {what} " + ", ".join(f"'{name}'" for name in names[:8])
                text += f" and {len(names) - 8} more" if len(names) > 8 else ""
        return text + ", the others are as they were"


class Offload:
    """What a manager's host emas need.

    Args:
        staging_bytes: For buffers on the device, and again on the host.
        averaged_on: Where.
        num_averages: That are kept.
    """

    def __init__(self, staging_bytes: int, averaged_on: str, num_averages: int) -> None:
        self._staging_bytes = staging_bytes
        self._averaged_on = averaged_on
        self._num_averages = num_averages
        self._stagings: dict[torch.device, _Staging] = {}
        self._flats: list[Tensor] = []
        self._why_unpinned = ""
        self._layout: _Layout | None = None
        # Started and not yet known to be done well, the oldest first.
        self._pending: list[_Job] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # ---- memory

    def is_by_host(self, host_dtype: torch.dtype, away_dtype: torch.dtype) -> bool:
        """Whether the host's kernels average a pair: by default where fewer bytes cross the link.

        Each way of it carries as much as the other, so there and back count once.
        """
        if self._averaged_on == "auto":
            return away_dtype.itemsize < self._num_averages * host_dtype.itemsize
        return self._averaged_on == "host"

    def allocate(self, like: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Emas for these params; pinned where a device averages them."""
        crossing = [not self.is_by_host(d, p.dtype) for p, d in zip(like, dtypes, strict=True)]
        made: dict[int, Tensor] = {}
        for pins in (False, True):
            chosen = [i for i, crosses in enumerate(crossing) if crosses == pins]
            emas = _storage.allocate(
                [like[i] for i in chosen],
                [dtypes[i] for i in chosen],
                [torch.device("cpu")] * len(chosen),
                self._pinned if pins else torch.empty,
            )
            made |= dict(zip(chosen, emas, strict=True))
        return [made[i] for i in range(len(like))]

    def _pinned(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        flat, why = pinned_or_not(size, dtype)
        self._why_unpinned = why or self._why_unpinned
        self._flats.append(flat)
        return flat

    def text(self, slots: Sequence[Slot]) -> str:
        """What there is of it, for a manager's repr; empty where there is nothing."""
        away = [slot for slot in slots if slot.is_away]
        if not away:
            return ""
        ways = {self._way_of(slot) for slot in away}
        return f"host emas averaged on the {' and the '.join(sorted(ways))}"

    def treatment(self, slot: Slot) -> str:
        """What there is to say of one slot, for describe()."""
        if not slot.is_away:
            return ""
        if slot.kind != "average":
            return "; in the host's memory"
        text = f"; in the host's memory, averaged on the {self._way_of(slot)}"
        if self._way_of(slot) == "device" and self._why_unpinned:
            text += f", not pinned ({self._why_unpinned})"
        return text

    def _way_of(self, slot: Slot) -> str:
        return "host" if self.is_by_host(slot.ema.dtype, slot.followed.dtype) else "device"

    def _staging_of(self, device: torch.device) -> _Staging:
        if device not in self._stagings:
            self._stagings[device] = _Staging(device, self._staging_bytes)
        return self._stagings[device]

    def forget(self) -> None:
        """Lets go of what it has of the tensors that were tracked."""
        self._layout = None

    # ---- updates

    def prepare(self, tracked: Tracked, op: str, copies: bool) -> list[Item]:
        """What an update goes through; raises what is wrong with it.

        Args:
            tracked: With the params that there are now.
            op: For errors.
            copies: Whether all is copied, as before the first average.
        """
        self.raise_error(op)
        slots = [s for s in tracked.slots if s.is_away and (copies or s.kind != "keep")]
        tracked.check_geometry(op, slots)
        if any(
            s.kind == "average" and (s.ema.dtype, s.followed.dtype) not in DTYPE_PAIRS
            for s in slots
        ) or any(s.followed.shape != s.ema.shape for s in slots):
            tracked.check_pairs(op)
        for device in {slot.followed.device for slot in slots}:
            if self._staging_of(device).streams.is_capturing():
                raise RuntimeError(
                    f"{_TITLE}.{op}: a graph is being captured on {device}, and an average in the "
                    "host's memory can't be updated by one; call update() outside of it, after "
                    "each replay"
                )
        return [_item_of(slot) for slot in slots]

    def start(
        self, items: Sequence[Item], momenta: Sequence[float] | None, form: Form, title: str
    ) -> None:
        """Starts an update.

        Args:
            items: Of prepare().
            momenta: One for each average; None to copy.
            form: The arithmetic.
            title: What it is, for an error.
        """
        if not items:
            return
        chunks = self._laid(items)
        ready = {}
        for device in {chunk.device for chunk in chunks}:
            streams = self._staging_of(device).streams
            ready[device] = streams.record(streams.current())
        self._start(_Job(title, items, chunks, momenta, form, ready))

    def fence(self, op: str, is_fenced: bool) -> None:
        """Makes the current streams wait for what was started.

        Args:
            op: For errors.
            is_fenced: Whether wait() is called before an optimizer writes the params: then only for
                what others may write.
        """
        if not is_fenced:
            self.wait(op)
            return
        for job in self._pending:
            if any(chunk.is_prompt for chunk in job.chunks):
                self._wait_on_host(job, job.prompt_asked)
                self._wait_on_device(job.prompt_read)

    def _laid(self, items: Sequence[Item]) -> Sequence[Chunk]:
        keys = [item.key() for item in items]
        if self._layout is None or self._layout.keys != keys:
            self._flats = [
                flat
                for flat in self._flats
                if any(_holds(flat, host) for item in items for host in item.hosts)
            ]
            by_host = [self.is_by_host(item.hosts[0].dtype, item.away.dtype) for item in items]
            chunks = lay(items, chunk_bytes_of(self._staging_bytes), by_host, self._flats)
            self._layout = _Layout(keys, [item.hosts for item in items], chunks)
        return self._layout.chunks

    def _start(self, job: _Job) -> None:
        self._pending.append(job)
        if self._thread is None or not self._thread.is_alive():
            # Of a fork, which has none of its parent's threads, or the first.
            self._jobs = queue.SimpleQueue()
            # It holds no manager: one that is dropped ends it.
            self._thread = threading.Thread(
                target=_work, args=(self._jobs,), name="fused_ema host ema", daemon=True
            )
            self._thread.start()
            weakref.finalize(self, _stop, self._jobs, self._thread)
        stagings = {device: self._staging_of(device) for device in job.ready}
        self._jobs.put(partial(_run, job, stagings))

    def wait(self, op: str) -> None:
        """What the current streams are asked for from now on comes after the last read of params.

        The host waits until that read has been asked for, not until it is done.
        """
        for job in self._pending:
            self._wait_on_host(job, job.asked)
            if not job.done.is_set():
                self._wait_on_device(job.read)
        self.raise_error(op)

    def synchronize(self, op: str) -> None:
        """The host waits until the averages have their new values."""
        for job in self._pending:
            self._wait_on_host(job, job.done)
        self.raise_error(op)
        self._pending.clear()

    def raise_error(self, op: str) -> None:
        """Raises what has gone wrong in an update, once."""
        self._pending = [j for j in self._pending if j.error is not None or not j.done.is_set()]
        failed = next((job for job in self._pending if job.error is not None), None)
        if failed is None:
            return
        self._pending.remove(failed)
        error = failed.error
        raise RuntimeError(
            f"{_TITLE}.{op}: {failed.title} failed beside the step: {type(error).__name__}: "
            f"{error}. {failed.outcome()}; load a state, or reset(), to be sure of them"
        ) from error

    def _wait_on_host(self, job: _Job, event: threading.Event) -> None:
        while not event.is_set():
            # Of a process that was forked, where the thread may have left a lock held for ever.
            if self._thread is None or not self._thread.is_alive():
                if job.error is None:
                    job.error = RuntimeError("its thread has ended, as where a process has forked")
                    job.in_flight = [chunk for chunk in job.chunks if chunk not in job.applied]
                return
            event.wait(_PATIENCE_SECONDS)

    def _wait_on_device(self, events: dict[torch.device, list[Any]]) -> None:
        for device, several in events.items():
            streams = self._staging_of(device).streams
            for event in several:
                streams.wait(streams.current(), event)

    # ---- swaps

    def set_aside(self, room: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        """Copies params to the host; they are there when it returns."""
        self._move(room, params, "down")

    def bring(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Copies values from the host into params, rounded where the dtypes differ."""
        self._move(values, params, "up")

    def _move(
        self, hosts: Sequence[Tensor], aways: Sequence[Tensor], way: Literal["down", "up"]
    ) -> None:
        pairs = list(zip(hosts, aways, strict=True))
        is_ours = [
            h.is_cpu
            and _slots.needs_stage(h.device, a.device)
            and _slots.shows_its_memory(h)
            and _slots.shows_its_memory(a)
            for h, a in pairs
        ]
        items = [
            Item(f"tensor {i}", [host], away, is_average=False)
            for i, (host, away) in enumerate(pairs)
            if is_ours[i]
        ]
        chunks = lay(items, chunk_bytes_of(self._staging_bytes), [True] * len(items))
        ready = {}
        for device in {chunk.device for chunk in chunks}:
            streams = self._staging_of(device).streams
            ready[device] = streams.record(streams.current())
        job = _Job("", items, chunks, None, "lerp", ready)
        stagings = {device: self._staging_of(device) for device in ready}
        with torch.no_grad():  # And in the mode of the caller, for buffers of inference mode.
            if way == "down":
                _update(job, stagings)
            else:
                _bring(job, stagings)
        rest = [pair for pair, ours in zip(pairs, is_ours, strict=True) if not ours]
        to, by = (0, 1) if way == "down" else (1, 0)
        _storage.copy([pair[to] for pair in rest], [pair[by] for pair in rest])


def _holds(flat: Tensor, tensor: Tensor) -> bool:
    begin, address = flat.data_ptr(), tensor.data_ptr()
    return begin <= address < begin + flat.numel() * flat.element_size()


def _item_of(slot: Slot) -> Item:
    is_average = slot.kind == "average"
    return Item(slot.name, slot.own_emas, slot.followed, is_average, slot.is_prompt)


# ---- on the thread


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # It holds tensors, and the next may be long in coming.


def _stop(jobs: queue.SimpleQueue[Any], thread: threading.Thread) -> None:
    """Ends a thread after what it has begun; at the interpreter's exit too."""
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()


def _run(job: _Job, stagings: dict[torch.device, _Staging]) -> None:
    try:
        with torch.no_grad():
            _update(job, stagings)
    except BaseException as error:  # It is the next call's to raise.
        job.error = error
    finally:
        for event in (job.prompt_asked, job.asked, job.done):
            event.set()


def _update(job: _Job, stagings: dict[torch.device, _Staging]) -> None:
    """Reads the params of a job chunk by chunk, and brings its averages up to date."""
    for device, staging in stagings.items():
        for stream in (staging.down, staging.work, staging.up):
            staging.streams.wait(stream, job.ready[device])
    passes = {device: _Pass(job, staging) for device, staging in stagings.items()}
    num_prompt = sum(chunk.is_prompt for chunk in job.chunks)
    for i, chunk in enumerate(job.chunks):
        if i == num_prompt:
            _note_read(job.prompt_read, passes)
            job.prompt_asked.set()
        passes[chunk.device].ask(chunk)
    _note_read(job.read, passes)
    job.prompt_read = job.prompt_read or job.read
    job.prompt_asked.set()
    job.asked.set()
    for each in passes.values():
        each.finish()


def _note_read(events: dict[torch.device, list[Any]], passes: dict[torch.device, _Pass]) -> None:
    for device, each in passes.items():
        events[device] = each.read()


class _Pass:
    """A job's way through the buffers of one device."""

    def __init__(self, job: _Job, staging: _Staging) -> None:
        self._job = job
        self._staging = staging
        self._streams = staging.streams
        # On their way to the host, the oldest first, each with its buffer and when it is there.
        self._waiting: deque[tuple[Chunk, Tensor, Any]] = deque()
        self._ring = staging.on_host()
        # On the device: of each buffer, when it has been copied back.
        self._num_up = 0
        self._copied_back: list[Any] = []
        self._gathered: Any = None
        self._read: dict[str, Any] = {}

    def read(self) -> list[Any]:
        """Events after all reads of params that were asked for."""
        return [*self._read.values()]

    def ask(self, chunk: Chunk) -> None:
        """Asks for a chunk's reads; what was asked for before may have to be done first."""
        if chunk.by_host or self._job.momenta is None:
            self._ask_by_host(chunk)
        else:
            self._ask_by_device(chunk)

    def finish(self) -> None:
        """Returns when all that was asked for is done."""
        while self._waiting:
            self._apply()
        for event in self._copied_back:
            self._streams.synchronize(event)
        self._job.applied += self._job.in_flight
        self._job.in_flight = []

    # ---- params to the host

    def _ask_by_host(self, chunk: Chunk) -> None:
        down = self._staging.down
        params = _params_of(self._job.items, chunk)
        num_bytes = chunk.length * chunk.away_dtype.itemsize
        buffer = self._ring.take(num_bytes, self._apply).view(chunk.away_dtype)
        if len(params) <= _MOST_COPIES or chunk.away_dtype == torch.uint8:
            parts = chunk.parts_in(buffer)
            pairs = list(zip(parts, params, strict=True))
        else:
            gathered = _as(self._staging.on_device(0), chunk.away_dtype, chunk.length)
            parts = chunk.parts_in(gathered)
            self._streams.run(down, partial(copy, parts, params))
            pairs = [(buffer, gathered)]
        self._staging.copy(down, pairs)
        arrived = self._streams.record(down)
        if pairs[0][0] is buffer:
            self._gathered = arrived
        self._read["down"] = arrived
        self._waiting.append((chunk, buffer, arrived))

    def _apply(self) -> None:
        """Brings the averages of the oldest chunk up to date."""
        chunk, buffer, arrived = self._waiting[0]
        self._streams.synchronize(arrived)
        values = chunk.parts_in(buffer)
        emas = list(zip(*(piece.hosts for piece in chunk.pieces), strict=True))
        if len(emas) > 1:  # The second may fail where the first has moved.
            self._job.in_flight.append(chunk)
        _move_averages(self._job, chunk, emas, values)
        if len(emas) > 1:
            self._job.in_flight.remove(chunk)
        self._job.applied.append(chunk)
        self._waiting.popleft()
        self._ring.give_back()

    # ---- averages to the device and back

    def _ask_by_device(self, chunk: Chunk) -> None:
        staging, streams = self._staging, self._streams
        index = self._num_up % staging.num_buffers
        self._num_up += 1
        buffer = staging.on_device(index)
        if index < len(self._copied_back):
            streams.wait(staging.up, self._copied_back[index])
        elif index == 0 and self._gathered is not None:
            streams.wait(staging.up, self._gathered)  # Into the same buffer.
        num_averages = len(chunk.pieces[0].hosts)
        room = staging.chunk_bytes // num_averages // _storage.ALIGNMENT_BYTES
        room *= _storage.ALIGNMENT_BYTES
        buffers = [
            _as(buffer[k * room :], chunk.host_dtype, chunk.length) for k in range(num_averages)
        ]
        runs = [
            (there[run.offset : run.offset + here.numel()].view(here.shape), here)
            for run in chunk.runs
            for there, here in zip(buffers, run.hosts, strict=True)
        ]
        params = _params_of(self._job.items, chunk)
        emas = [chunk.parts_in(each) for each in buffers]
        self._job.in_flight.append(chunk)
        staging.copy(staging.up, runs)
        streams.wait(staging.work, streams.record(staging.up))
        streams.run(staging.work, partial(_move_averages, self._job, chunk, emas, params))
        self._read["work"] = streams.record(staging.work)
        streams.wait(staging.down, self._read["work"])
        staging.copy(staging.down, [(here, there) for there, here in runs])
        event = streams.record(staging.down)
        self._copied_back[index : index + 1] = [event]


def _bring(job: _Job, stagings: dict[torch.device, _Staging]) -> None:
    """Writes values of the host into what is on the device, for the current streams."""
    for device, staging in stagings.items():
        staging.streams.wait(staging.up, job.ready[device])
    written: dict[torch.device, deque[Any]] = {device: deque() for device in stagings}
    rings = {device: staging.on_host() for device, staging in stagings.items()}

    def free(device: torch.device) -> None:
        stagings[device].streams.synchronize(written[device].popleft())
        rings[device].give_back()

    for chunk in job.chunks:
        staging = stagings[chunk.device]
        num_bytes = chunk.length * chunk.away_dtype.itemsize
        memory = rings[chunk.device].take(num_bytes, partial(free, chunk.device))
        buffer = memory.view(chunk.away_dtype)
        parts = chunk.parts_in(buffer)
        copy(parts, [piece.hosts[0] for piece in chunk.pieces])
        params = _params_of(job.items, chunk)
        if len(params) <= _MOST_COPIES or chunk.away_dtype == torch.uint8:
            staging.copy(staging.up, list(zip(params, parts, strict=True)))
        else:
            there = _as(staging.on_device(0), chunk.away_dtype, chunk.length)
            staging.copy(staging.up, [(there, buffer)])
            parts = chunk.parts_in(there)
            staging.streams.run(staging.up, partial(copy, params, parts))
        written[chunk.device].append(staging.streams.record(staging.up))
    for device, events in written.items():
        streams = stagings[device].streams
        if events:
            streams.wait(streams.current(), events[-1])
        while events:
            free(device)  # For whoever comes next.


def _params_of(items: Sequence[Item], chunk: Chunk) -> list[Tensor]:
    return [p.part_of(as_moved(items[p.index].away, items[p.index].is_bits)) for p in chunk.pieces]


def _as(buffer: Tensor, dtype: torch.dtype, length: int) -> Tensor:
    return buffer[: length * dtype.itemsize].view(dtype)


def _move_averages(
    job: _Job, chunk: Chunk, emas: Sequence[Sequence[Tensor]], params: Sequence[Tensor]
) -> None:
    """Brings each average of some parts of tensors up to date."""
    for k, its in enumerate(emas):
        if job.momenta is None or not chunk.is_average:
            copy(its, params)
        else:
            ops._update(its, params, job.momenta[k], job.form)


def copy(dst: Sequence[Tensor], src: Sequence[Tensor]) -> None:
    """Copies within a device; other threads' caches stay."""
    if (dst[0].dtype, src[0].dtype) not in EXCHANGE_PAIRS:
        torch._foreach_copy_(list(dst), list(src))
    elif _native.C is not None:
        _native.C.copy_(dst, src)
    else:
        _foreach.copy(dst, src)
