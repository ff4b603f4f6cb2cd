"""A drop-in for diffusers' ``EMAModel``; diffusers itself is needed for pretrained models only.

ema = fused_ema.hooks.diffusers.EMAModel(
    unet.parameters(), model_cls=UNet2DModel, model_config=unet.config
)
ema.step(unet.parameters())  # after each optimizer.step()
ema.save_pretrained("checkpoint/unet_ema")
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fused_ema import _checks
from fused_ema.hooks import _shadow

_WHERE = "hooks.diffusers.EMAModel"
_SETTINGS = (
    *("decay", "min_decay", "optimization_step", "update_after_step"),
    *("use_ema_warmup", "inv_gamma", "power"),
)


class EMAModel(_shadow.ShadowParams):
    """diffusers' ``EMAModel`` with all parameters in one call and without temporary memory.

    ``shadow = shadow - (1 - d) * (shadow - param)`` for parameters that require a gradient; others
    are copied. The decay d at a step is 0 for ``t = step - update_after_step - 1`` of 0 and less,
    then ``(1 + t) / (10 + t)``, or with ``use_ema_warmup`` ``1 - (1 + t / inv_gamma) ** -power``,
    not above ``decay`` and not below ``min_decay`` (diffusers, ``EMAModel.get_decay``). It is
    computed as a lerp with one rounding where diffusers rounds three times, so the bits may differ
    from diffusers' in the last place.

    States and pretrained folders can be loaded by diffusers, and the other way round. Saving and
    loading them leaves the random generators as they are.

    Different from diffusers: :meth:`average_parameters` exchanges values in place instead of
    store, copy_to and restore; parameters on another device than their average are moved one at a
    time; unknown options and lists that don't fit are errors, shapes included; a module in place of
    its parameters too. Under DeepSpeed's ZeRO-3 gather the parameters around each call.

    Args:
        parameters: Cloned; an iterable of tensors.
        decay: The greatest weight of the old value, in [0, 1].
        min_decay: The least one once averaging has begun, in [0, 1].
        update_after_step: Steps during which the averages follow the parameters, from 0.
        use_ema_warmup: Use the other one of the two formulas.
        inv_gamma: Steps that scale that formula, above 0.
        power: Its exponent, above 0.
        foreach: Taken for diffusers' sake; makes no difference.
        model_cls: The model's class, for :meth:`save_pretrained`.
        model_config: Its configuration, for the same.

    Attributes:
        optimization_step: Steps so far.
        cur_decay_value: The decay of the last step; None before the first.

    Raises:
        TypeError: Not an iterable of tensors; a setting that is no number.
        ValueError: No parameters, as from an iterator that was used up; a setting outside of its
            range.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any | None = None,
        model_config: Mapping[str, Any] | None = None,
    ) -> None:
        settings = {
            "decay": decay,
            "min_decay": min_decay,
            "optimization_step": 0,
            "update_after_step": update_after_step,
            "use_ema_warmup": use_ema_warmup,
            "inv_gamma": inv_gamma,
            "power": power,
        }
        self._set(_checked(_WHERE, settings))
        super().__init__(_WHERE, parameters)
        self.cur_decay_value: float | None = None
        self.foreach = foreach
        self.model_cls = model_cls
        self.model_config = model_config

    def _set(self, settings: Mapping[str, Any]) -> None:
        self.decay: float = settings["decay"]
        self.min_decay: float = settings["min_decay"]
        self.optimization_step: int = settings["optimization_step"]
        self.update_after_step: int = settings["update_after_step"]
        self.use_ema_warmup: bool = settings["use_ema_warmup"]
        self.inv_gamma: float = settings["inv_gamma"]
        self.power: float = settings["power"]

    @property
    def temp_stored_params(self) -> list[Tensor] | None:
        """What :meth:`store` stored; in average_parameters() the parameters' own values.

        May be assigned: None, or as many tensors of the averages' shapes.
        """
        return self._kept()

    @temp_stored_params.setter
    def temp_stored_params(self, tensors: Iterable[Tensor] | None) -> None:
        self._set_kept("temp_stored_params", tensors)

    @classmethod
    def from_pretrained(cls, path: Any, model_cls: Any, foreach: bool = False) -> EMAModel:
        """Reads averages and their state from a folder of :meth:`save_pretrained`.

        Args:
            path: The folder.
            model_cls: The model's class in diffusers.
            foreach: Makes no difference.

        Raises:
            OSError: From diffusers: no such folder, or no weights in it.
            ValueError: A setting outside of its range.
        """
        config = model_cls.load_config(path)
        with _generators_kept():
            # What the model's class doesn't know is the averages' state.
            _, extra = model_cls.from_config(config, return_unused_kwargs=True)
            model = model_cls.from_pretrained(path)
        ema = cls(
            model.parameters(), model_cls=model_cls, model_config=model.config, foreach=foreach
        )
        ema.load_state_dict(extra)
        return ema

    def save_pretrained(self, path: Any) -> None:
        """Writes the averages as a model of ``model_cls``, with the state in its configuration.

        Args:
            path: A folder; made where it isn't there.

        Raises:
            ValueError: Made without ``model_cls`` or ``model_config``.
        """
        for name in ("model_cls", "model_config"):
            if getattr(self, name) is None:
                raise ValueError(
                    f"fused_ema.{_WHERE}.save_pretrained: {name} is None; pass it where the "
                    "EMAModel is made"
                )
        assert self.model_cls is not None
        with _generators_kept():
            model = self.model_cls.from_config(self.model_config)
        state = self.state_dict()
        del state["shadow_params"]
        model.register_to_config(**state)
        self.copy_to(model.parameters())
        model.save_pretrained(path)

    def get_decay(self, optimization_step: int) -> float:
        """The decay of a step.

        Args:
            optimization_step: Its number, from 1; 0 before the first.

        Raises:
            ValueError: A step below 0, or no whole number.
        """
        step = _checks.count(f"{_WHERE}.get_decay", "optimization_step", optimization_step, 0)
        since = step - self.update_after_step - 1
        if since <= 0:
            return 0.0
        decay: float
        if self.use_ema_warmup:
            decay = 1 - (1 + since / self.inv_gamma) ** -self.power
        else:
            decay = (1 + since) / (10 + since)
        return max(min(decay, self.decay), self.min_decay)

    def step(self, parameters: Iterable[Tensor]) -> None:
        """Takes the parameters' values into the averages; after each optimizer step.

        Args:
            parameters: Those it was made with, or others like them.

        Raises:
            TypeError: Not an iterable of tensors.
            ValueError: Another number of tensors, or other shapes.
            RuntimeError: Inside of :meth:`average_parameters`.

            Nothing has changed when an error is raised.
        """
        self._refuse_if_swapped("step")
        step = self.optimization_step + 1
        decay = self.get_decay(step)
        self._average("step", parameters, 1 - decay, copies_frozen=True)
        self.optimization_step, self.cur_decay_value = step, decay

    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Copies the averages into parameters, rounded to their dtype.

        Args:
            parameters: Those it was made with, or others like them.

        Raises:
            TypeError: As :meth:`step`.
            ValueError: As :meth:`step`.
        """
        self._copy_to(self._fitting("copy_to", parameters))

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keeps copies of the parameters' values on the CPU for :meth:`restore`.

        Args:
            parameters: Those it was made with, or others like them.

        Raises:
            TypeError: As :meth:`step`.
            ValueError: As :meth:`step`.
            RuntimeError: Inside of :meth:`average_parameters`.
        """
        self._refuse_if_swapped("store")
        listed = self._fitting("store", parameters)
        cpu = [torch.device("cpu")] * len(listed)
        self._stored = _shadow.own(listed, cpu, [None] * len(listed))

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Copies what :meth:`store` kept into the parameters, and lets go of it.

        Args:
            parameters: Those it was made with, or others like them.

        Raises:
            TypeError: As :meth:`step`.
            ValueError: As :meth:`step`.
            RuntimeError: Nothing is stored; inside of :meth:`average_parameters`.
        """
        self._refuse_if_swapped("restore")
        self._restore(self._fitting("restore", parameters))
        self._stored = None

    @contextmanager
    def average_parameters(self, parameters: Iterable[Tensor]) -> Iterator[None]:
        """The parameters hold the averages inside, and their own values again after it.

        Whatever is raised inside, the values come back. Nothing is allocated where shadow and
        parameter have one dtype and device; others are set aside.

        Args:
            parameters: Those it was made with, or others like them.

        Raises:
            TypeError: As :meth:`step`.
            ValueError: As :meth:`step`.
            RuntimeError: Inside of another.
        """
        with self._averages_in(self._fitting("average_parameters", parameters)):
            yield

    def pin_memory(self) -> None:
        """Moves the averages, which must be on the CPU, to page-locked memory.

        Raises:
            RuntimeError: From torch: no accelerator; inside of :meth:`average_parameters`.
        """
        self._refuse_if_swapped("pin_memory")
        self._shadow = [s.pin_memory() for s in self._shadow]

    def state_dict(self) -> dict[str, Any]:
        """The settings, ``optimization_step`` and ``shadow_params``, as diffusers'.

        The tensors are the live ones, and the averages also in average_parameters().
        """
        state: dict[str, Any] = {name: getattr(self, name) for name in _SETTINGS}
        return {**state, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over a state of this class or of diffusers'.

        As with diffusers, keys that are missing leave what is there, others are left alone, and
        averages come with the dtype and the device that they have in the state.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            TypeError: Not a dictionary; a setting that is no number.
            ValueError: A setting outside of its range; another number of tensors, or other shapes.
            RuntimeError: Inside of :meth:`average_parameters`.

            Nothing has changed when an error is raised.
        """
        where = f"{_WHERE}.load_state_dict"
        self._refuse_if_swapped("load_state_dict")
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"fused_ema.{where}: state_dict is a {type(state_dict).__name__}; pass a dictionary"
            )
        given = {name: state_dict.get(name, getattr(self, name)) for name in _SETTINGS}
        settings = _checked(where, given)
        shadow = self._shadow
        if state_dict.get("shadow_params") is not None:
            shadow = self._listed_in_state(state_dict, "shadow_params")
            shadow = _shadow.own(shadow, [None] * len(shadow), [None] * len(shadow))
        self._set(settings)
        self._shadow = shadow


@contextmanager
def _generators_kept() -> Iterator[None]:
    """For making a model, which draws random numbers: a run that saves is the one that doesn't."""
    numpy: Any = sys.modules.get("numpy")
    state = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state[0])
        if numpy is not None:
            numpy.random.set_state(state[1])


def _checked(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    checked = dict(settings)
    for name in ("decay", "min_decay"):
        checked[name] = _shadow.checked_decay(where, name, settings[name])
    for name in ("optimization_step", "update_after_step"):
        checked[name] = _checks.count(where, name, settings[name], 0)
    for name in ("inv_gamma", "power"):
        _checks.positive(where, name, settings[name])
    if not isinstance(settings["use_ema_warmup"], bool):
        value = settings["use_ema_warmup"]
        raise ValueError(f"fused_ema.{where}: use_ema_warmup is {value!r}; pass True or False")
    return checked
