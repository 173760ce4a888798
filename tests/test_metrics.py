"""The paper's measures, and that they do not depend on how rows are spread."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from raylens.metrics import Sums, measure, sigma

VALUES = st.floats(-1e3, 1e3)


@given(arrays(float, st.integers(2, 60), elements=VALUES), st.integers(1, 5), st.randoms())
def test_metric_does_not_depend_on_how_rows_are_split_over_ranks(true, num_ranks, random):
    """Sum first, divide last: ranks and batches differ in size."""
    predicted = true * 0.5 + np.array([random.random() for _ in true])
    rank = np.array([random.randrange(num_ranks) for _ in true])

    together = Sums.of(true, predicted)
    apart = sum((Sums.of(true[rank == r], predicted[rank == r]) for r in range(num_ranks)), Sums())

    assert apart.num_images == together.num_images
    parts, whole = ([sums.rmse, sums.bias, sums.mae] for sums in (apart, together))
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-9)


def test_gradient_is_the_slope_of_numpys_fitted_line():
    """The paper fits predicted against true, not true against predicted."""
    rng = np.random.default_rng(1)
    true = rng.uniform(-2.5, -1.5, 1000)
    predicted = 0.6 * true + 0.1 * rng.standard_normal(1000)

    slope, _ = np.polyfit(true, predicted, 1)

    assert Sums.of(true, predicted).gradient == pytest.approx(slope, rel=1e-9)


def test_gradient_is_undefined_where_the_truth_does_not_vary():
    """Alpha is held in five of the six test sets; a number there would be rounding error."""
    assert Sums.of(np.full(50, np.float32(-1.6)), np.linspace(-2, -1, 50)).gradient is None


def test_sigma_of_a_normal_distribution_is_its_standard_deviation():
    """Section 3 calls the half-width of the central 68 % equal to one standard deviation."""
    errors = np.random.default_rng(1).normal(5.0, 3.0, 200_000)

    assert sigma(errors) == pytest.approx(3.0, rel=0.01)


def test_bias_is_positive_where_too_much_is_predicted():
    """The sign carries the paper's claim that N is over-predicted at shallow slopes."""
    assert measure(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == pytest.approx(
        {"gradient": 1.0, "rmse": 1.0, "sigma": 0.0, "bias": 1.0, "relative_rmse": 2.0}
    )


def test_arrays_that_would_broadcast_are_refused():
    """(B, 1) against (B,) is a (B, B) error that looks like learning."""
    with pytest.raises(ValueError, match="one shape"):
        Sums.of(np.zeros(3), np.zeros((3, 1)))
