"""The package's types, as a type checker of a user sees them; and that the program runs."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.assert_type is of 3.11")


def test_the_program_of_a_user_runs():
    import user_program

    assert user_program.train() == pytest.approx(1 - 2**-0.1)
    assert [entry["num_tensors"] for entry in user_program.by_hand()] == [2]
