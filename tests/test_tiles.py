from __future__ import annotations

import itertools

import pytest

from fused_ema import _native
from fused_ema.testing import EDGE_SIZES

SIZES = ((4, 4), (4, 2), (8, 8), (2, 2))
WARP, BLOCK = 32, 256
# Elements that a thread takes at once: 16 bytes of the wider side. It takes four such vectors.
VECTORS = {(4, 4): 4, (4, 2): 4, (8, 8): 2, (2, 2): 8}


def tiles_of(spans, sizes):
    return _native.C.tiles_of(spans, *sizes)


def covered(tiles, spans, sizes):
    """Every element of every span exactly once, and both sides at the same element."""
    by_pair = {}
    for pair, begin_a, begin_b, n, _ in tiles:
        assert begin_a == begin_b
        by_pair.setdefault(pair, []).append((begin_a, n))
    for pair, (_, _, size) in enumerate(spans):
        at = 0
        for begin, n in sorted(by_pair.pop(pair, [])):
            assert begin == at
            assert n > 0
            at += n
        assert at == size
    assert not by_pair


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("offset_a", [0, 1, 3])
@pytest.mark.parametrize("offset_b", [0, 1, 5])
def test_every_element_is_covered_once(sizes, offset_a, offset_b):
    base = 1 << 20
    spans = [
        ((i + 1) * base * 16 + offset_a * sizes[0], (i + 99) * base * 16 + offset_b * sizes[1], n)
        for i, n in enumerate((*EDGE_SIZES, 10 * BLOCK * 32 + 77))
    ]
    covered(tiles_of(spans, sizes), spans, sizes)


@pytest.mark.parametrize("sizes", SIZES)
def test_block_tiles_come_first_full_and_aligned(sizes):
    block_tile, warp_tile = BLOCK * VECTORS[sizes] * 4, WARP * VECTORS[sizes] * 4
    for offset_a, offset_b, n in itertools.product((0, 1, 2), (0, 1, 3), (1, 5000, 100_000)):
        a, b = 4096 + offset_a * sizes[0], (1 << 30) + offset_b * sizes[1]
        tiles = tiles_of([(a, b, n)], sizes)
        kinds = [is_block for *_, is_block in tiles]
        assert kinds == sorted(kinds, reverse=True)
        for _, begin, _, count, is_block in tiles:
            if is_block:
                assert count == block_tile
                assert (a + begin * sizes[0]) % 16 == 0
            else:
                assert count <= warp_tile


def test_a_small_misaligned_tensor_is_one_warp_tile():
    assert tiles_of([(4, 1 << 20, 64)], (4, 4)) == [(0, 0, 0, 64, False)]


def test_ten_thousand_small_tensors_are_ten_thousand_warps():
    spans = [(i << 12, (i << 12) + (1 << 40), 64) for i in range(1, 10_001)]
    tiles = tiles_of(spans, (4, 4))
    assert len(tiles) == 10_000
    assert not any(is_block for *_, is_block in tiles)


def test_a_head_aligns_the_narrow_side_too_where_any_does():
    # Both sides miss a whole vector of four elements by one.
    a, b = 16 - 4, (1 << 20) + 8 - 2
    first_block = next(t for t in tiles_of([(a, b, 100_000)], (4, 2)) if t[4])
    assert first_block[1:3] == (1, 1)
    assert (a + 4) % 16 == 0
    assert (b + 2) % 8 == 0


def test_counts_need_64_bits():
    n = 2**31 + 12345
    tiles = tiles_of([(1 << 20, 1 << 40, n)], (4, 4))
    assert sum(count for *_, count, _ in tiles) == n
    assert max(begin for _, begin, *_ in tiles) > 2**31


def test_no_spans_no_tiles():
    assert tiles_of([], (4, 4)) == []
    assert tiles_of([(4096, 8192, 0)], (4, 4)) == []
