"""What a dataset shows of its simulation, for the paper's figures 2 and 3."""

import json

import pytest

from raylens.illustrate import illustration


@pytest.mark.parametrize(
    ("changes", "slopes", "example"),
    [
        ({}, [-1.6, -1.8, -2.0, -2.2, -2.4], None),
        # From 1e6 Msun on a lens holds 8 thousand at -1.6, 36 thousand at -1.8 and 121 thousand at -2.
        ({"subhalos.mass_min": 1e6, "subhalos.alpha": -1.7}, [-1.6, -1.8], -1.7),
        ({"subhalos.mass_min": 1e6, "subhalos.alpha": -2.5}, [-1.6, -1.8], -1.6),
    ],
)
def test_slopes_at_which_a_lens_would_hold_too_many_subhalos_are_left_out(tiny, changes, slopes, example):
    """It is drawn after the shards; a dataset must not fail, hours later, by what it does not hold."""
    shown = json.loads(illustration(tiny.override(changes)))

    assert [population["alpha"] for population in shown["populations"]] == slopes
    assert example in (None, shown["example"]["alpha"])
