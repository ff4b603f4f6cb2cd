"""Which sum of averages comes nearest to a wanted one, and how near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fused_ema.posthoc._profiles import Profile, inner

# Directions of the least squares below this part of the largest are left out: they are rounding.
_CUTOFF = 1e-13


@contextmanager
def _one_thread() -> Iterator[None]:
    # On two busy cores threads took 2 s for a system of 128, which takes one 0.01 s.
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)


@dataclass(frozen=True)
class Solution:
    """Coefficients, which add up to 1, and what they leave.

    Attributes:
        coefficients: One for each average.
        error: The norm of what the weights over the iterations are off by, over that of the wanted
            ones: for weights that move at random about a point, the noise that this adds.
        norm: The sum of the coefficients' sizes: how much they enlarge the averages' own rounding.
    """

    coefficients: list[float]
    error: float
    norm: float


@_one_thread()
def solve(profiles: Sequence[Profile], wanted: Profile) -> Solution:
    """Least squares over the profiles, in double."""
    products = inner([*profiles, wanted])
    scale = products.diagonal().sqrt()
    scaled = products / scale[:, None] / scale
    gram, cross = scaled[:-1, :-1], scaled[:-1, -1]
    values, vectors = torch.linalg.eigh(gram)
    is_kept = values > values[-1] * _CUTOFF
    inverse = torch.where(is_kept, 1 / values, 0)

    def applied(x: Tensor) -> Tensor:
        return torch.mv(vectors, inverse * torch.mv(vectors.T, x))

    # All weights add up to 1, those of the sum too: a model that doesn't move is its own average.
    ones = 1 / scale[:-1]
    free, one = applied(cross), applied(ones)
    found = free + one * ((1 / scale[-1] - ones @ free) / (ones @ one))
    square = found @ gram @ found - 2 * (found @ cross) + 1
    coefficients = found * scale[-1] / scale[:-1]
    return Solution(
        coefficients.tolist(),
        float(square.clamp(min=0).sqrt()),
        float(coefficients.abs().sum()),
    )
