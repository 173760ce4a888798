"""Rows of a dataset: what decides them, what does not, and how much noise they hold."""

import numpy as np
import pytest
from scipy import stats

from raylens import baselines, recipes
from raylens.config import SPLITS, Simulation
from raylens.image import normalise
from raylens.metrics import measure
from raylens.simulate import draw_block, render_block, render_light, require_drawable, simulate_block

QUANTITIES = {
    "alpha": "subhalos.alpha",
    "theta_E": "lens.theta_E",
    "q": "lens.q",
    "phi": "lens.phi",
    "x": "lens.x",
    "y": "lens.y",
    "z_lens": "lens.z_lens",
    "z_source": "source.z",
    "source_sigma": "source.sigma",
}


def varied(**changes) -> Simulation:
    """The paper's varied geometry, with the two quantities varied that it fixes."""
    others = {"lens.z_lens": {"uniform": [0.3, 0.7]}, "source.sigma": {"uniform": [0.5, 1.0]}}
    return recipes.paper_varied().override(others | changes).simulation


@pytest.mark.parametrize("engine", ["numba", "lenstronomy"])
@pytest.mark.parametrize("split", ["train", "test-alpha-2.4"])
def test_row_depends_on_its_index_and_not_on_its_block(engine, split):
    """Otherwise a dataset would change with the number of workers that made it, or with a retry."""
    simulation = varied(engine=engine, **{"output.catalogue": True})
    own = slice(*draw_block(simulation, [9, 3, 7, 1], split).first_subhalo[2:4])

    alone = simulate_block(simulation, [7], split)
    in_company = simulate_block(simulation, [9, 3, 7, 1], split)

    for name in alone.keys() - {"first_subhalo"}:
        np.testing.assert_array_equal(alone[name], in_company[name][own if name.startswith("subhalos_") else [2]])


def test_splits_seeds_and_rows_share_no_random_numbers():
    """A test image that is a training image in disguise would flatter every network."""
    streams = [draw_block(varied(), range(50), split) for split in SPLITS]
    streams.append(draw_block(varied(seed=1), range(50), "train"))

    for name in ("phi", "subhalos_x", "subhalos_mass"):
        values = np.concatenate([getattr(draws, name) for draws in streams])
        assert len(np.unique(values)) == len(values)


def test_noise_differs_between_splits_seeds_and_rows():
    """As above, for the stream that draws the noise: with it repeated, pairs of images would be recognised."""
    blocks = [(varied(**changes), split) for changes, split in (({}, "train"), ({"seed": 1}, "train"), ({}, "test"))]
    noise = []
    for simulation, split in blocks:
        draws = draw_block(simulation.override({"camera.normalise": False}), range(4), split)
        noise.append((render_block(draws) - render_light(draws)).reshape(4, -1))

    correlation = np.corrcoef(np.concatenate(noise))

    assert np.abs(correlation - np.eye(12)).max() < 0.1  # six standard deviations at 3,600 pixels


@pytest.mark.parametrize("split", [split for split, alpha in SPLITS.items() if alpha is not None])
def test_alpha_is_held_in_the_splits_named_after_it(split):
    """Figures 5 to 8 have a curve for each of these slopes."""
    assert set(draw_block(Simulation(), range(3), split).alpha) == {float(split.removeprefix("test-alpha"))}


@pytest.mark.parametrize("fixed", QUANTITIES)
def test_fixing_one_quantity_leaves_the_other_draws_as_they_were(fixed):
    """Only so does a pair of datasets show the effect of one quantity and not of other dice."""
    before = draw_block(varied(), range(20))

    after = draw_block(
        varied(**{QUANTITIES[fixed]: {"alpha": -2.0, "z_lens": 0.5, "z_source": 1.77}.get(fixed, 0.9)}), range(20)
    )

    assert len(np.unique(getattr(after, fixed))) == 1
    for name in QUANTITIES.keys() - {fixed}:
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize("fixed", ["q", "phi", "source_sigma"])
def test_what_has_no_mass_leaves_the_subhalos_as_they_were(fixed):
    """The catalogue of a row follows from its masses and redshifts alone."""
    before = draw_block(varied(), range(20))

    after = draw_block(varied(**{QUANTITIES[fixed]: 0.9}), range(20))

    for name in ("subhalos_x", "subhalos_y", "subhalos_mass", "subhalos_theta_E", "first_subhalo"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_heavier_lens_keeps_the_subhalos_of_a_lighter_one():
    """A longer catalogue is the shorter one continued, so that drawing by blocks of 512 decides nothing."""
    light, heavy = (draw_block(Simulation().override({"subhalos.mass_fraction": share}), [0]) for share in (0.1, 0.4))

    assert heavy.num_subhalos[0] > 512 > light.num_subhalos[0]
    np.testing.assert_array_equal(heavy.subhalos_mass[: light.num_subhalos[0]], light.subhalos_mass)
    np.testing.assert_array_equal(heavy.subhalos_x[: light.num_subhalos[0]], light.subhalos_x)


@pytest.mark.parametrize("reference", ["frame", "peak"])
def test_noise_is_of_the_stated_signal_to_noise(reference):
    """Noise is so strong that it sets what can be learned; a wrong reading of 300 would be a factor of 60."""
    draws = draw_block(varied(**{"camera.normalise": False, "camera.noise_reference": reference}), range(100))
    light = render_light(draws).astype(float)

    noise = render_block(draws) - light
    # A sum over 3,600 pixels has 60 times the noise of one.
    signal = {"frame": light.sum(axis=(1, 2)) / 60, "peak": light.max(axis=(1, 2))}[reference]

    assert np.mean(signal / noise.std(axis=(1, 2))) == pytest.approx(300, rel=0.01)
    assert np.mean(noise / noise.std(axis=(1, 2), keepdims=True)) == pytest.approx(0, abs=0.01)


def test_image_without_noise_is_the_same_image():
    """What noise costs is measured on pairs, with and without, of one sky."""
    quiet, noisy = (varied(**{"camera.normalise": False, "camera.signal_to_noise": level}) for level in (None, 1e9))

    without, with_little = (simulate_block(simulation, range(4))["image"] for simulation in (quiet, noisy))

    np.testing.assert_allclose(with_little, without, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(without, render_light(draw_block(noisy, range(4))))


@pytest.mark.parametrize("signal_to_noise", [300.0, None])
def test_images_run_from_zero_to_one(signal_to_noise):
    """Section 2.1; the networks see nothing else of the brightness."""
    image = simulate_block(varied(**{"camera.signal_to_noise": signal_to_noise}), range(20))["image"]

    np.testing.assert_array_equal(image.min(axis=(1, 2)), 0)
    np.testing.assert_array_equal(image.max(axis=(1, 2)), 1)


def test_blank_image_normalises_to_zero():
    """A division by its span would be 0/0."""
    np.testing.assert_array_equal(normalise(np.full((2, 4, 4), 3.0)), np.zeros((2, 4, 4)))


def test_subhalos_lie_evenly_in_a_disc_of_two_einstein_radii_around_the_lens():
    """Section 2.1. A forgotten square root would heap them at the centre."""
    draws = draw_block(varied(), range(100))
    row = np.repeat(np.arange(100), draws.num_subhalos)
    dx, dy = draws.subhalos_x - draws.x[row], draws.subhalos_y - draws.y[row]
    share_of_area = (dx**2 + dy**2) / (2 * draws.theta_E[row]) ** 2
    share_of_turn = np.arctan2(dy, dx) / (2 * np.pi) + 0.5

    assert share_of_area.max() <= 1 + 1e-12
    assert stats.kstest(share_of_area, "uniform").pvalue > 0.01
    assert stats.kstest(share_of_turn, "uniform").pvalue > 0.01


def test_subhalos_reach_a_tenth_of_the_lens_mass_and_stop():
    """N, the label, is the number at which they do."""
    draws = draw_block(varied(), range(200))

    total = draws.sum_over_subhalos(draws.subhalos_mass)
    before_the_last = total - draws.subhalos_mass[draws.first_subhalo[1:] - 1]

    assert np.all(total >= 0.1 * draws.lens_mass * (1 - 1e-12))
    assert np.all(before_the_last < 0.1 * draws.lens_mass)


def test_einstein_radius_stays_when_the_source_moves():
    """Our reading of the paper: z_source changes the mass of the lens, and so N, and not its theta_E."""
    near, far = (draw_block(Simulation().override({"source.z": z}), range(50)) for z in (1.0, 4.0))

    np.testing.assert_array_equal(near.theta_E, far.theta_E)
    assert np.all(near.lens_mass > far.lens_mass)
    assert near.num_subhalos.sum() > far.num_subhalos.sum()


@pytest.mark.parametrize("recipe", ["coded-fixed", "coded-varied"])
def test_coded_recipe_has_the_population_of_the_papers_released_code(recipe):
    """What that code draws: docs/paper.md. Alpha from N alone has gradient 0.645 there."""
    draws = draw_block(recipes.load(recipe).simulation, range(3_000))
    fitted = baselines.fit(draws.alpha, {"num_subhalos": draws.num_subhalos})

    masses, first = np.unique(draws.subhalos_mass, return_index=True)
    np.testing.assert_allclose(masses, [1e8, 1e9, 1e10, 1e11], rtol=1e-12)
    if recipe == "coded-fixed":
        np.testing.assert_allclose(draws.subhalos_theta_E[first], [2.45e-4, 1.14e-3, 5.28e-3, 2.45e-2], rtol=3e-3)
        np.testing.assert_allclose(0.1 * draws.lens_mass, 1.44e12, rtol=5e-3)
    assert np.median(draws.num_subhalos) == pytest.approx(267, rel=0.03)
    assert draws.num_subhalos.min() == pytest.approx(69, rel=0.2)
    assert draws.num_subhalos.max() == pytest.approx(902, rel=0.1)
    predicted = fitted.predict({"num_subhalos": draws.num_subhalos}, 3_000)
    assert measure(draws.alpha, predicted)["gradient"] == pytest.approx(0.645, abs=0.04)


@pytest.mark.parametrize("bits", [1, 8])
def test_pixels_are_rounded_to_as_many_values_as_there_are_bits_for(bits):
    """And to the nearest of them, so that no light is lost."""
    exact, rounded = (simulate_block(varied(**{"camera.bits": n}), range(4))["image"] for n in (None, bits))

    assert len(np.unique(rounded)) <= 2**bits
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=0.501 / (2**bits - 1))


def test_unknown_split_is_refused():
    """A slip of the pen would otherwise be a fresh random stream under a name nobody reads."""
    with pytest.raises(ValueError, match=r"^tset is no split; the splits are train, validation, test, test-alpha-1\.6"):
        draw_block(Simulation(), range(1), "tset")


def test_too_many_subhalos_are_refused():
    """A slip in mass_min would fill the memory before the first image."""
    many = Simulation().override({"subhalos.mass_min": 1e3})

    with pytest.raises(
        ValueError, match=r"about [\d.]+e\+08 subhaloes at slope -2\.5, .* raise subhalos.mass_min \(now 1000 Msun\)"
    ):
        require_drawable(many)


def test_only_the_slopes_of_a_split_must_be_drawable():
    """A light mass_min is no mistake where the slope is shallow, though at -2.4 it would be."""
    shallow = Simulation().override({"subhalos.mass_min": 3e6, "subhalos.alpha": -1.6})

    for split in ("train", "test", "test-alpha-2.2"):
        require_drawable(shallow, split)
    with pytest.raises(ValueError, match=r"split test-alpha-2\.4 would hold about 1\.4e\+05 subhaloes at slope -2\.4"):
        require_drawable(shallow, "test-alpha-2.4")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_recipes_are_drawable(recipe, split):
    """The refusal above must leave the paper alone."""
    require_drawable(recipes.load(recipe).simulation, split)
