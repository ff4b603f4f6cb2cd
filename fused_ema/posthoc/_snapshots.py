"""Averages saved now and then in training, with what is needed to combine them afterwards."""

from __future__ import annotations

import json
import os
import re
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_ema import _checks, _safetensors, _shards
from fused_ema._foreach import dtype_name
from fused_ema.formats._files import Replacing
from fused_ema.manager import EMAManager
from fused_ema.posthoc import _files
from fused_ema.posthoc._profiles import Momenta, Saved, Window, gamma_of, std_of_gamma
from fused_ema.schedules import Schedule

_TITLE = "fused_ema.posthoc.Snapshots"
_WHERE = "posthoc.Snapshots"
_MEAN = "mean"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _Average(NamedTuple):
    """One that is saved: its name, its live tensors, and its profile after so many iterations."""

    name: str
    manager: EMAManager
    named_emas: Callable[[], Iterable[tuple[str, Tensor]]]
    profile_at: Callable[[int], Saved | None]


class Snapshots:
    """Saves a manager's averages at some iterations, for :func:`fused_ema.posthoc.reconstruct`.

    It belongs to the manager from then on: after each of its updates it looks whether the iteration
    is one to save, and so one line is all there is to write, whoever calls the update::

        widths = {"short": schedules.power(0.05), "long": schedules.power(0.10)}
        Snapshots(EMAManager(model, widths), "snapshots", every=1000)

    Each average of each iteration is one safetensors file, complete or not there, that serves by
    itself too: ``fused_ema.state.read``, ``python -m fused_ema inspect``. Of a sharded model each
    tensor is gathered, one after the other, and the first rank writes; of other processes that
    train the same model the first one writes.

    A run that is resumed goes on in its folder. What the folder has of iterations that the run
    comes to again, as after a kill, is moved into ``superseded`` there. Another run is refused.

    Args:
        ema: The manager, of one average or of several; or several managers of one model, in a list
            or by name; or the callback that makes it: ``hooks.lightning.EMA``,
            ``hooks.transformers.EMACallback``, without DeepSpeed. With momenta of two power
            functions any other comes out; of whatever momenta, what they span.
        folder: Is made where it isn't there.
        every: Save after each so many iterations.
        at: Save after these numbers of iterations as well.
        averages: Save the manager's averages.
        means: Save the plain mean of the weights since the last snapshot as well: it takes another
            average's memory and time, and gives any window between snapshots.
        dtype: Of the files. bfloat16 halves them and costs precision: each value is off by up to
            0.4 %, which a reconstruction enlarges by the sum of its coefficients' sizes.
        keep_last: Keep the files of the last so many iterations, and remove others.
        keep_evenly: Keep those of at most so many iterations, spread as evenly as they can be.
        run: What tells this run's files from another's; None for something random.

    Raises:
        TypeError: ``ema`` is something else.
        ValueError: A setting out of its range; nothing to save, or no iteration to save it at;
            names that clash; managers of several models, or of other intervals.
        FileExistsError: From the first update of a new run: the folder has another run's files.
    """

    def __init__(
        self,
        ema: Any,
        folder: str | os.PathLike[str],
        every: int | None = None,
        *,
        at: Iterable[int] = (),
        averages: bool = True,
        means: bool = False,
        dtype: torch.dtype = torch.float32,
        keep_last: int | None = None,
        keep_evenly: int | None = None,
        run: str | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._every = None if every is None else _checks.count(_WHERE, "every", every, 1)
        self._at = {_checks.count(_WHERE, "at", one, 1) for one in at}
        if not averages and not means:
            raise ValueError(f"{_TITLE}: neither averages nor means are saved; choose one")
        if dtype not in _DTYPES:
            raise ValueError(
                f"{_TITLE}: dtype is {dtype}; choose from {', '.join(map(str, _DTYPES))}"
            )
        if keep_last is not None and keep_evenly is not None:
            raise ValueError(f"{_TITLE}: both keep_last and keep_evenly are set; choose one")
        if keep_evenly is not None and means:
            raise ValueError(
                f"{_TITLE}: keep_evenly with means would leave windows that no file covers; "
                "save less often, or set keep_last"
            )
        self._keep_last = _at_least(keep_last, "keep_last", 1)
        self._keep_evenly = _at_least(keep_evenly, "keep_evenly", 2)
        self._averages, self._means, self._dtype = averages, means, dtype
        self._run = run
        self._is_begun = False
        self._saved: list[_Average] = []
        self._since = 0
        self._mean: EMAManager | None = None
        if hasattr(ema, "_when_made"):
            ema._when_made(lambda made: self._attach(made))
        else:
            self._attach(ema)

    # ---- what is saved

    def _attach(self, ema: Any) -> None:
        named = _named(ema)
        managers = [manager for _, manager in named]
        first = managers[0]
        if any(manager._model is not first._model for manager in managers):
            raise ValueError(f"{_TITLE}: the managers are of several models; pass those of one")
        intervals = sorted({manager._interval for manager in managers})
        for interval in intervals:
            if self._every is not None and self._every % interval:
                raise ValueError(
                    f"{_TITLE}: every is {self._every}, no multiple of the manager's interval "
                    f"{interval}: the average would be of some iterations before"
                )
        if self._means and len(intervals) > 1:
            raise ValueError(
                f"{_TITLE}: the managers have the intervals {intervals}; means need one of all"
            )
        self._is_begun = False
        self._saved = []
        if self._averages:
            for name, manager in named:
                self._saved += _averages_of(name, manager)
        if self._means:
            self._mean = self._make_mean(first)
            mean = _Average(_MEAN, self._mean, self._mean.named_emas, self._window)
            self._saved.append(mean)
        names = [average.name for average in self._saved]
        if clashing := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"{_TITLE}: {len(names)} averages have the names {', '.join(names)}, of which "
                f"{', '.join(clashing)} clash; name them: Snapshots({{'short': ema, ...}}, ...)"
            )
        for name in names:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    f"{_TITLE}: {name!r} becomes part of a file's name; of letters, digits, '_', "
                    "'-' and '.' alone"
                )
        self._managers = managers
        for manager in managers:
            manager._after_update.append(partial(self._offered, manager))

    def _make_mean(self, like: EMAManager) -> EMAManager:
        """A manager of the same tensors, whose ema is their mean since the last snapshot."""
        treatments = like.describe()
        names = {name: re.sub(r"([*?\[])", r"[\1]", name) for name in treatments}
        averaged = [name for name in names if treatments[name].startswith("averaged")]
        buffers = [member.name for member in like._tracked.members if member.is_buffer]
        return EMAManager(
            like._model,
            interval=like._interval,
            momentum_fun=self._momentum_of_mean,
            ema_dtype=like._policy.ema_dtype,
            device=like._policy.device,
            include=list(names.values()),
            buffers={names[n]: "average" if n in averaged else "copy" for n in buffers} or None,
            sources=like._sources,
        )

    def _momentum_of_mean(self, iteration: int) -> float:
        assert self._mean is not None
        interval = self._mean._interval
        return 1 / max(1, (iteration + 1) // interval - self._since // interval)

    def _window(self, iteration: int) -> Saved | None:
        assert self._mean is not None
        since, time = (n // self._mean._interval * self._mean._interval for n in self._times())
        return Window(since, time) if time > since else None

    def _times(self) -> tuple[int, int]:
        return self._since, self._managers[0].iteration

    # ---- in training

    def _offered(self, manager: EMAManager) -> None:
        """After an update of one of the managers."""
        iteration = manager.iteration
        if not self._is_begun:
            self._begin(iteration)
        if self._mean is not None and manager is self._managers[0]:
            self._mean.update(iteration - 1)
        is_wanted = iteration in self._at or (
            self._every is not None and iteration % self._every == 0
        )
        if is_wanted and all(other.iteration == iteration for other in self._managers):
            self.save()

    def _begin(self, iteration: int) -> None:
        """At the first update that is seen: whether the folder is this run's."""
        emas = list(self._managers[0]._emas().values())
        with _shards.one_error(_TITLE, emas):
            if _shards.is_first(emas):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._take_folder(iteration)
        if self._mean is None or self._mean.iteration != iteration - 1:
            self._since = iteration - 1
        self._is_begun = True

    def _take_folder(self, iteration: int) -> None:
        # What saves that were killed have left; each of the size of a model.
        for path in self._folder.glob(".[0-9]*.safetensors.*.tmp"):
            path.unlink(missing_ok=True)
        heads = _files.heads(self._folder)
        runs = {head.run for head in heads}
        if self._run is None and len(runs) == 1 and iteration > 1:
            self._run = runs.pop()
        if runs - {self._run} or (heads and iteration == 1):
            newest = max(heads, key=lambda head: head.iteration)
            raise FileExistsError(
                f"{_TITLE}: '{self._folder}' has {len(heads)} snapshots of another run, up to "
                f"'{newest.path.name}'; choose another folder, or empty it"
            )
        if self._run is None:
            self._run = uuid.uuid4().hex[:12]
        again = [head.path for head in heads if head.iteration >= iteration]
        if again:
            aside = self._folder / "superseded"
            aside.mkdir(exist_ok=True)
            for path in again:
                os.replace(path, aside / path.name)
            warnings.warn(
                f"{_TITLE}: the run goes on at iteration {iteration - 1}, and '{self._folder}' had "
                f"{len(again)} snapshots of later ones, which are in '{aside}' now",
                stacklevel=2,
            )

    def save(self) -> list[Path]:
        """Writes the averages as they are now, whatever the iteration.

        Returns:
            The files; of a process that doesn't write, where they are.

        Raises:
            RuntimeError: There was no update yet, or the managers aren't at one iteration.
            OSError: A file can't be written.
        """
        if not self._saved or not self._is_begun:
            raise RuntimeError(f"{_TITLE}: there was no update yet, and so there is no average")
        iterations = [manager.iteration for manager in self._managers]
        if len(set(iterations)) > 1:
            raise RuntimeError(
                f"{_TITLE}: the managers are at the iterations {iterations}; update all of them "
                "before a snapshot"
            )
        iteration = iterations[0]
        paths = []
        for average in self._saved:
            profile = average.profile_at(iteration)
            if profile is not None:
                paths.append(self._write(average, iteration, profile))
        if self._mean is not None:
            self._since = iteration
        self._drop()
        return paths

    def _write(self, average: _Average, iteration: int, profile: Saved) -> Path:
        emas = dict(average.named_emas())
        path = self._folder / f"{iteration:09d}-{average.name}.safetensors"
        writes = _shards.is_first(list(emas.values()))

        def dtype_of(ema: Tensor) -> torch.dtype:
            return self._dtype if ema.is_floating_point() else ema.dtype

        def chunks(name: str) -> Iterator[memoryview]:
            whole = _shards.whole(emas[name].detach())
            if writes:
                yield from _safetensors.chunks_of(whole.to(dtype_of(emas[name])))

        layouts = {name: (dtype_of(ema), tuple(ema.shape)) for name, ema in emas.items()}
        if not writes:
            # What is gathered is gathered by all, in the order in which it is written.
            for name in sorted(layouts, key=lambda name: -layouts[name][0].itemsize):
                for _ in chunks(name):
                    pass
            return path
        treatments = average.manager.describe()
        averaged = [name for name in emas if treatments[name].startswith("averaged")]
        head = {
            "version": _files.VERSION,
            "run": self._run,
            "average": average.name,
            "iteration": iteration,
            "interval": average.manager._interval,
            "dtype": dtype_name(self._precision([emas[name] for name in averaged])),
            "profile": profile.to_json(),
        }
        metadata = {
            "format": "pt",
            "fused_ema.slot": "ema",
            "fused_ema.iteration": str(iteration),
            "fused_ema.num_updates": str(average.manager.num_updates),
            _files.KEY: json.dumps(head),
        }
        if len(averaged) < len(emas):
            metadata["fused_ema.averaged"] = json.dumps(averaged)
        with Replacing(path) as file:
            _safetensors.write_stream(file, layouts, metadata, chunks)
        return path

    def _precision(self, emas: Iterable[Tensor]) -> torch.dtype:
        """Of what is written: an average that is kept in bfloat16 is no better in a wider file."""
        dtypes = {self._dtype, *(ema.dtype for ema in emas)}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def _drop(self) -> None:
        """Removes what the rule doesn't keep."""
        if self._keep_last is None and self._keep_evenly is None:
            return
        if not _shards.is_first(list(self._managers[0]._emas().values())):
            return
        heads = _files.heads(self._folder)
        kept = sorted({head.iteration for head in heads})
        if self._keep_last is not None:
            kept = kept[-self._keep_last :]
        while self._keep_evenly is not None and len(kept) > self._keep_evenly:
            # The one whose neighbours are nearest to each other; never the first or the last.
            inner = range(1, len(kept) - 1)
            del kept[min(inner, key=lambda i: kept[i + 1] - kept[i - 1])]
        for head in heads:
            if head.iteration not in kept:
                head.path.unlink(missing_ok=True)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the run needs for :meth:`load_state_dict`: the run and the mean.

        A run that is resumed without it goes on in its folder all the same; the mean then begins
        at the iteration where it is resumed, and the file says so.
        """
        mean = None if self._mean is None else self._mean.state_dict()
        return {"run": self._run, "since": self._since, "mean": mean}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from a state.

        Raises:
            ValueError: It has a mean and this one none, or the other way round; as
                :meth:`fused_ema.EMAManager.load_state_dict`.
        """
        mean = state_dict["mean"]
        if (mean is None) != (self._mean is None):
            has = "no mean" if mean is None else "a mean"
            raise ValueError(
                f"{_TITLE}.load_state_dict: the state has {has}; make it with the same means="
            )
        if self._mean is not None:
            self._mean.load_state_dict(mean)
        self._run, self._since = state_dict["run"], state_dict["since"]


def _at_least(value: int | None, name: str, least: int) -> int | None:
    return None if value is None else _checks.count(_WHERE, name, value, least)


def _named(ema: Any) -> list[tuple[str | None, EMAManager]]:
    named: list[tuple[str | None, Any]]
    if isinstance(ema, Mapping):
        named = [(str(name), manager) for name, manager in ema.items()]
    elif isinstance(ema, Sequence):
        named = [(None, manager) for manager in ema]
    else:
        named = [(None, ema)]
    wrong = [type(manager).__name__ for _, manager in named if not isinstance(manager, EMAManager)]
    if wrong or not named:
        raise TypeError(
            f"{_TITLE}: ema is {f'a {wrong[0]}' if wrong else 'empty'}; pass an EMAManager, a "
            "list or dictionary of them, or the EMA callback of Lightning or transformers"
        )
    return named


def _averages_of(name: str | None, manager: EMAManager) -> list[_Average]:
    found = []
    for own, exact in zip(manager._averages.names, manager._averages.momenta, strict=True):
        momenta = Momenta(exact, manager._interval, manager._begin)
        named = "-".join(filter(None, (name, own))) or _name_of(exact, manager._interval)
        named_emas = partial(manager.named_emas, own or None)
        found.append(_Average(named, manager, named_emas, momenta.at))
    return found


def _name_of(momentum: float | Schedule, interval: int) -> str:
    gamma = gamma_of(momentum, interval)
    if gamma is not None:
        return f"power-{std_of_gamma(gamma):.4g}"
    return "ema" if callable(momentum) else f"ema-{momentum:.6g}"
