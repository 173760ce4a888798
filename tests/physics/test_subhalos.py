"""The mass function against numbers the paper states, against quadrature, and against draws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import quad

from raylens.config import Simulation
from raylens.physics import lenses, subhalos
from raylens.physics.cosmology import distance_ratio
from raylens.simulate import draw_block

# No deadline: the first example pays for imports and compilation, and the machine may be busy.
unhurried = settings(deadline=None)
LIMITS = {"mass_min": 7.40e8, "mass_max": 1.70e11}  # [Msun], those of the recipes
slopes = st.one_of(st.integers(-3500, 1500).map(lambda n: n / 1000), st.sampled_from([-3.0, -2.0, -1.0, 0.0]))

# Mean number of subhaloes of the paper's fixed lens: docs/paper.md, confirmed there by 20,000 draws.
MEAN_NUM_SUBHALOS = {-1.6: 164, -1.8: 250, -2.0: 363, -2.2: 496, -2.4: 635}


def tenth_of_the_fixed_lens() -> float:
    """The mass [Msun] that the paper's subhaloes reach: section 2.1, with theta_E = 1.5 and redshifts 0.5 and 1.77."""
    ratio = distance_ratio(np.array(0.5), np.array(1.77), cosmology="Planck18")
    return 0.1 * float(lenses.mass(lenses.velocity_dispersion(np.array(1.5), ratio)))


def test_recipe_limits_are_those_that_the_papers_means_ask_for():
    """The paper does not print its mass limits; ours are solved from what it does print, not guessed."""
    recipe = Simulation().subhalos

    mass_min, mass_max = subhalos.solve_mass_limits(tenth_of_the_fixed_lens())

    assert (f"{mass_min:.2e}", f"{mass_max:.2e}") == (f"{recipe.mass_min:.2e}", f"{recipe.mass_max:.2e}")
    assert (recipe.mass_min, recipe.mass_max) == (LIMITS["mass_min"], LIMITS["mass_max"])


def test_means_that_no_limits_give_are_refused():
    """Steeper means lighter, so more subhaloes; the solver must not return its last guess for the contrary."""
    with pytest.raises(ValueError, match="no mass limits give the mean numbers"):
        subhalos.solve_mass_limits(1.452e12, {-1.7: 700.0, -2.5: 200.0})


@pytest.mark.parametrize(("alpha", "expected"), MEAN_NUM_SUBHALOS.items())
def test_mean_number_of_drawn_subhalos_is_the_expected_one(alpha, expected):
    """N is a label: its mean at a slope ties the draws, the mass scale and the lens mass together."""
    num_subhalos = draw_block(Simulation(), range(2_000), f"test-alpha{alpha}").num_subhalos

    assert num_subhalos.mean() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("alpha", "expected"), MEAN_NUM_SUBHALOS.items())
def test_mean_num_subhalos_is_the_expected_one(alpha, expected):
    """The formula decides what is refused as too many, without drawing a subhalo."""
    mean = subhalos.mean_num_subhalos(alpha=alpha, **LIMITS, mass_to_reach=tenth_of_the_fixed_lens())

    assert mean == pytest.approx(expected, abs=0.6)


@unhurried
@given(alpha=slopes)
def test_mass_quantile_runs_from_limit_to_limit(alpha):
    """A mass beyond the limits would be a population that the recipe does not name."""
    masses = subhalos.mass_quantile(np.linspace(0, 1, 101), alpha=alpha, **LIMITS)

    np.testing.assert_allclose(masses[[0, -1]], list(LIMITS.values()), rtol=1e-9)
    assert np.all(np.diff(masses) > 0)


@pytest.mark.parametrize("alpha", [-2.5, -2.0, -1.5, -1.0, 0.0])
def test_drawn_masses_follow_the_power_law(alpha):
    """The slope is what the networks infer; at -1 the integral is a logarithm, and has a branch of its own."""
    masses = subhalos.mass_quantile(np.random.default_rng(0).random(100_000), alpha=alpha, **LIMITS)

    # In x = log M the law is exp((alpha + 1) x): a truncated exponential, or even at alpha = -1.
    x, span = np.log(masses / LIMITS["mass_min"]), np.log(LIMITS["mass_max"] / LIMITS["mass_min"])
    rate = alpha + 1
    share_below = np.expm1(rate * x) / np.expm1(rate * span) if rate else x / span

    assert stats.kstest(share_below, "uniform").pvalue > 0.01


@unhurried
@given(alpha=slopes, power=st.integers(0, 2), log_min=st.floats(5, 10), decades=st.floats(0.1, 4))
def test_mean_power_agrees_with_quadrature(alpha, power, log_min, decades):
    """The closed form has two branches, and the mean number, the limits and the refusals rest on it."""
    mass_min, mass_max = 10**log_min, 10 ** (log_min + decades)
    above, below = (
        quad(lambda x, k=k: np.exp((alpha + k + 1) * x), 0, np.log(mass_max / mass_min), epsabs=0)[0]
        for k in (power, 0)
    )

    mean = subhalos.mean_power(power, alpha=alpha, mass_min=mass_min, mass_max=mass_max)

    assert mean == pytest.approx(mass_min**power * above / below, rel=1e-7)


@pytest.mark.parametrize("alpha", [-2.5, -1.5])
def test_masses_of_decades_come_in_proportion_to_their_number(alpha):
    """As the paper's released code draws them: 1e8, 1e9, 1e10 and 1e11 Msun, the k-th in proportion to k^alpha."""
    limits = {"mass_min": 1e8, "mass_max": 1e11, "mass_function": "decades"}
    share = np.arange(1, 5) ** alpha / (np.arange(1, 5) ** alpha).sum()

    drawn = subhalos.mass_quantile(np.random.default_rng(0).random(100_000), alpha=alpha, **limits)

    masses, counts = np.unique(drawn, return_counts=True)
    np.testing.assert_allclose(masses, [1e8, 1e9, 1e10, 1e11], rtol=1e-12)
    assert stats.chisquare(counts, 100_000 * share).pvalue > 0.01
    assert subhalos.mean_power(2, alpha=alpha, **limits) == pytest.approx((share * masses**2).sum())
