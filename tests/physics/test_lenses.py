"""The closed forms against lenstronomy and astropy, and against what must hold between them.

Tolerances are absolute, in arcsec: a thousandth of a pixel is 1e-4.
"""

import numpy as np
import pytest
from astropy import units
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.Util.param_util import phi_q2_ellipticity

from raylens.physics import lenses
from raylens.physics.cosmology import COSMOLOGIES, distance_ratio

# No deadline: the first example pays for imports and compilation, and the machine may be busy.
unhurried = settings(deadline=None)
einstein_radii = st.floats(0.3, 2.7)
axis_ratios = st.floats(0.05, 1.0)
coordinates = st.floats(-6.0, 6.0, allow_subnormal=False)
ratios = st.floats(0.01, 0.99)


@unhurried
@given(x=coordinates, y=coordinates, theta_E=einstein_radii, q=axis_ratios)
@example(x=0.0, y=1e-8, theta_E=2.7, q=0.05)  # next to the centre
@example(x=3.0, y=0.0, theta_E=1.5, q=1 - 2**-53)  # the roundest that is not round
def test_sie_agrees_with_lenstronomy(x, y, theta_E, q):
    """Every image rests on this deflection, its orientation, and its convention for theta_E."""
    # lenstronomy replaces an elliptical radius below 1e-9 arcsec by 1e-9; it is exact elsewhere. Its
    # SIE is softened everywhere, so this is its EPL, whose theta_E has our convention too (b = theta_E sqrt q).
    assume(np.hypot(q * x, y) > 1e-9)
    x, y = np.array([x]), np.array([y])
    e1, e2 = phi_q2_ellipticity(0, q)

    theirs = LensModel(["EPL"]).alpha(x, y, [{"theta_E": theta_E, "gamma": 2.0, "e1": e1, "e2": e2}])

    np.testing.assert_allclose(lenses.sie_deflection(x, y, theta_E=theta_E, q=q), theirs, rtol=0, atol=1e-9)


@unhurried
@given(x=coordinates, y=coordinates, theta_E=st.floats(0, 2.7))
def test_sis_agrees_with_lenstronomy(x, y, theta_E):
    """Subhaloes are these spheres, four hundred to an image."""
    # lenstronomy squares the coordinates, which vanishes in double precision below 1e-154 arcsec.
    assume(x == y == 0 or np.hypot(x, y) > 1e-150)
    x, y = np.array([x]), np.array([y])

    theirs = LensModel(["SIS"]).alpha(x, y, [{"theta_E": theta_E}])

    np.testing.assert_allclose(lenses.sis_deflection(x, y, theta_E=theta_E), theirs, rtol=0, atol=1e-9)


@unhurried
@given(x=coordinates, y=coordinates, theta_E=einstein_radii)
def test_round_sie_is_the_sis(x, y, theta_E):
    """q = 1 is a legal lens, where the ellipsoid's formula divides by zero."""
    x, y = np.array([x]), np.array([y])

    np.testing.assert_array_equal(
        lenses.sie_deflection(x, y, theta_E=theta_E, q=1.0), lenses.sis_deflection(x, y, theta_E=theta_E)
    )


@pytest.mark.parametrize("excess", [1e-2, 1e-4, 1e-6, 1e-8, 1e-12, 2**-53])
def test_sie_tends_to_sis_as_q_tends_to_one(excess):
    """A formula that loses digits near q = 1 would put a jump into the varied set, which reaches 1."""
    x, y = np.random.default_rng(0).uniform(-6, 6, (2, 1000))

    sie = lenses.sie_deflection(x, y, theta_E=1.5, q=1 - excess)

    np.testing.assert_allclose(sie, lenses.sis_deflection(x, y, theta_E=1.5), rtol=0, atol=1.5 * excess + 1e-14)


@pytest.mark.parametrize("profile", [lenses.sie_deflection, lenses.sie_convergence])
@pytest.mark.parametrize("q", [-0.78, 0.0, 1.25, np.nan])
def test_axis_ratio_outside_its_range_is_refused(profile, q):
    """q = 1.25 is a major over minor ratio, and would silently turn the lens by 90 degrees or give nan."""
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]; got"):
        profile(np.ones(1), np.ones(1), theta_E=1.5, q=q)


def test_deflections_at_the_origin_are_zero():
    """The centre of a lens may lie on a pixel, and one nan there would spoil the image's normalisation."""
    origin = np.zeros(1)

    deflections = [
        lenses.sis_deflection(origin, origin, theta_E=1.5),
        lenses.sie_deflection(origin, origin, theta_E=1.5, q=0.78),
        lenses.sheet_deflection(origin, origin, convergence=-0.5, radius=3.0),
    ]

    np.testing.assert_array_equal(deflections, np.zeros((3, 2, 1)))


@unhurried
@given(angle=st.floats(0, 2 * np.pi), radius=st.floats(0.05, 6.0), theta_E=einstein_radii, q=axis_ratios)
def test_sie_convergence_is_half_the_divergence_of_the_deflection(angle, radius, theta_E, q):
    """Deflection and mass are two formulas for one lens; a wrong factor sqrt(q) would part them."""
    x, y = np.array([radius * np.cos(angle)]), np.array([radius * np.sin(angle)])
    h = 1e-4 * np.hypot(q * x, y)  # [arcsec]; central differences are off by (h / radius)^2

    right, left, up, down = (
        lenses.sie_deflection(x + dx, y + dy, theta_E=theta_E, q=q) for dx, dy in ((h, 0), (-h, 0), (0, h), (0, -h))
    )
    divergence = (right[0] - left[0] + up[1] - down[1]) / (2 * h)

    np.testing.assert_allclose(lenses.sie_convergence(x, y, theta_E=theta_E, q=q), divergence / 2, rtol=1e-5)


@unhurried
@given(theta_E=einstein_radii, q=axis_ratios)
def test_area_inside_the_critical_curve_does_not_depend_on_q(theta_E, q):
    """This is what the intermediate-axis convention means; in another one theta_E would drift with q."""
    angle = (np.arange(4096) + 0.5) * (2 * np.pi / 4096)

    # The critical curve of an isothermal ellipsoid is where its convergence is 1/2, and that goes as 1/radius.
    radius = 2 * lenses.sie_convergence(np.cos(angle), np.sin(angle), theta_E=theta_E, q=q)
    area = np.mean(radius**2) * np.pi

    assert area == pytest.approx(np.pi * theta_E**2, rel=1e-9)


@unhurried
@given(distance=st.floats(0.0, 10.0), angle=st.floats(0, 2 * np.pi), radius=st.floats(0.5, 6), kappa=st.floats(-2, 2))
def test_sheet_deflects_by_the_mass_within(distance, angle, radius, kappa):
    """Gauss: kappa times the distance inside; outside, all of the disc's mass as if at its centre."""
    x, y = np.array([distance * np.cos(angle)]), np.array([distance * np.sin(angle)])
    expected = kappa * distance if distance <= radius else kappa * radius**2 / distance

    alpha_x, alpha_y = lenses.sheet_deflection(x, y, convergence=kappa, radius=radius)

    np.testing.assert_allclose(alpha_x * np.cos(angle) + alpha_y * np.sin(angle), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(alpha_x * np.sin(angle) - alpha_y * np.cos(angle), 0, atol=1e-12)


def test_sheet_deflection_is_continuous_at_its_edge():
    """A jump would draw a circle of radius 2 theta_E into every compensated image."""
    radius = 3.0
    beside = radius * np.array([1 - 1e-12, 1 + 1e-12])

    inside, outside = lenses.sheet_deflection(beside, np.zeros(2), convergence=-0.5, radius=radius)[0]

    assert inside == pytest.approx(outside, abs=1e-11)
    assert inside == pytest.approx(-0.5 * radius, abs=1e-11)


def test_sheet_cancels_a_uniform_population_at_the_ring():
    """This is what compensation is for: the ring stays at theta_E, half the radius of the population."""
    rng = np.random.default_rng(0)
    num_subhalos, radius, theta_E = 200_000, 3.0, 1e-5
    distance, angle = radius * np.sqrt(rng.random(num_subhalos)), 2 * np.pi * rng.random(num_subhalos)
    halo_x, halo_y = distance * np.cos(angle), distance * np.sin(angle)
    around = np.arange(16) * (2 * np.pi / 16)
    x, y = radius / 2 * np.cos(around), radius / 2 * np.sin(around)

    population = np.array(
        [
            np.sum(lenses.sis_deflection(a - halo_x, b - halo_y, theta_E=theta_E), axis=1)
            for a, b in zip(x, y, strict=True)
        ]
    ).T
    convergence = lenses.compensating_convergence(num_subhalos * theta_E, radius)
    sheet = lenses.sheet_deflection(x, y, convergence=convergence, radius=radius)
    left_over = np.mean((population[0] + sheet[0]) * np.cos(around) + (population[1] + sheet[1]) * np.sin(around))

    # The mean of the elliptic integral 2/pi E(k) over the disc within k = 1/2 is 0.968: 3.2 % are left.
    assert left_over / (convergence * radius / 2) == pytest.approx(0.032, abs=0.005)


@unhurried
@given(
    z_lens=st.floats(0.05, 0.95),
    z_source=st.floats(1.0, 6.0),
    theta_E=einstein_radii,
    cosmology=st.sampled_from(list(COSMOLOGIES)),
)
def test_velocity_dispersion_is_that_of_astropys_distances(z_lens, z_source, theta_E, cosmology):
    """Eq. 2.2, with D_ds from astropy rather than from our shortcut for flat cosmologies."""
    D_s = COSMOLOGIES[cosmology].angular_diameter_distance(z_source)
    D_ds = COSMOLOGIES[cosmology].angular_diameter_distance(z_lens, z_source)
    angle = (theta_E * units.arcsec).to_value(units.rad)
    expected = 299_792.458 * np.sqrt(angle / (4 * np.pi) * float(D_s / D_ds))

    ratio = distance_ratio(np.array(z_lens), np.array(z_source), cosmology=cosmology)
    sigma_v = lenses.velocity_dispersion(np.array(theta_E), ratio)

    assert float(sigma_v) == pytest.approx(expected, rel=1e-6)


@unhurried
@given(theta_E=st.floats(1e-5, 3.0), ratio=ratios)
def test_einstein_radius_inverts_velocity_dispersion(theta_E, ratio):
    """The main lens is taken one way and its subhaloes the other."""
    assert lenses.einstein_radius(lenses.velocity_dispersion(theta_E, ratio), ratio) == pytest.approx(
        theta_E, rel=1e-12
    )


@unhurried
@given(mass=st.floats(1e6, 1e15))
def test_velocity_dispersion_of_mass_inverts_mass(mass):
    """As above, for eq. 2.3."""
    assert lenses.mass(lenses.velocity_dispersion_of_mass(mass)) == pytest.approx(mass, rel=1e-12)


def test_heavier_lenses_move_faster():
    """Eq. 2.3 is printed upside down; read so, 1200 km/s would still be 1e15 Msun, but heavy would be light."""
    assert lenses.mass(1200.0) == pytest.approx(1e15)
    assert lenses.mass(2400.0) == pytest.approx(8e15)
