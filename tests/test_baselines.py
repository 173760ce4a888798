"""What labels say of each other: whether the fit is the conditional mean, and holds where nothing varies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylens import baselines, models, recipes
from raylens.baselines import Baseline
from raylens.metrics import measure
from raylens.simulate import draw_block

# RMSE of alpha and N from the truth alone: docs/paper.md.
KNOWN = {
    ("paper-fixed", "n_constant"): 178,
    ("paper-fixed", "n_from_ring"): 16.5,
    ("paper-fixed", "alpha_constant"): 0.289,
    ("paper-fixed", "alpha_from_true_n"): 0.074,
    ("paper-fixed", "alpha_from_true_n_and_mass"): 0.074,
    ("paper-fixed", "alpha_from_ring"): 0.092,
    ("paper-varied", "n_constant"): 264,
    ("paper-varied", "n_from_ring"): 35,
    ("paper-varied", "alpha_from_true_n"): 0.199,
    ("paper-varied", "alpha_from_true_n_and_mass"): 0.080,
    ("paper-varied", "alpha_from_ring"): 0.12,
}


def labels(recipe: str, split: str, num_images: int) -> dict[str, np.ndarray]:
    draws = draw_block(recipes.load(recipe).simulation, range(num_images), split)
    return {
        **{name: getattr(draws, name) for name in ("alpha", "num_subhalos", "lens_mass", "theta_E")},
        "subhalo_theta_E": draws.sum_over_subhalos(draws.subhalos_theta_E),
    }


@pytest.fixture(scope="module")
def populations():
    names = {recipe for recipe, _ in KNOWN}
    return {name: (labels(name, "train", 10_000), labels(name, "test", 5_000)) for name in names}


@pytest.mark.parametrize(("recipe", "name"), KNOWN)
def test_baselines_reach_what_is_known_to_be_possible_without_an_image(populations, recipe, name):
    """A weak baseline would make any network look good."""
    train, test = populations[recipe]
    network = "n-cnn" if name.startswith("n_") else "alpha-cnn"
    target = models.TARGETS[network]

    fitted = baselines.fit(train[target], {column: train[column] for column in models.BASELINES[network][name]})
    rmse = measure(test[target], fitted.predict(test, 5_000))["rmse"]

    assert rmse == pytest.approx(KNOWN[recipe, name], rel=0.05)


@settings(deadline=None)
@given(low=st.floats(1e-3, 1e12), factor=st.floats(1.01, 1e4), slope=st.floats(-5, 5))
def test_what_is_a_polynomial_of_a_logarithm_is_found_exactly(low, factor, slope):
    """Whatever the unit: masses are 1e12, radii are 1e-3."""
    given_values = np.geomspace(low, low * factor, 50)
    target = 3 + slope * np.log(given_values / low) ** 2

    fitted = baselines.fit(target, {"mass": given_values})

    np.testing.assert_allclose(fitted.predict({"mass": given_values}, 50), target, rtol=1e-6, atol=1e-6)


def test_what_lies_beyond_the_training_labels_is_taken_for_their_end():
    """A polynomial of degree five would leave the sky."""
    fitted = baselines.fit(np.array([1.0, 2.0, 4.0]), {"x": np.array([1.0, 2.0, 3.0])})

    low, high = fitted.predict({"x": np.array([1e-9, 1e9])}, 2)

    assert (low, high) == (pytest.approx(1.0), pytest.approx(4.0))


def test_what_does_not_vary_tells_nothing():
    """In the fixed geometry all lenses have one mass."""
    rng = np.random.default_rng(0)
    target, n = rng.random(100), rng.random(100) + 1

    with_mass = baselines.fit(target, {"n": n, "mass": np.full(100, 1e13)})
    without = baselines.fit(target, {"n": n})

    columns = {"n": n, "mass": np.full(100, 2e13)}
    np.testing.assert_array_equal(with_mass.predict(columns, 100), without.predict(columns, 100))


def test_a_baseline_is_read_as_it_was_written():
    """It stands in model.json, and evaluation reads it there."""
    fitted = baselines.fit(np.array([1.0, 2.0, 4.0]), {"x": np.array([1.0, 2.0, 3.0])})

    assert Baseline.parse(fitted.as_dict()) == fitted
