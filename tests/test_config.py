"""What configurations and recipe files accept, refuse and name."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from raylens import recipes
from raylens.config import SPLITS, Experiment, Normal, Search, Simulation, Uniform, keys, quantile

# No deadline: the first example pays for imports and compilation, and the machine may be busy.
unhurried = settings(deadline=None)

# What a user might write, what must hold, and what arrived.
REFUSALS = [
    ("lens.q", 1.25, "lens.q is minor/major, so it must lie in (0, 1]; got 1.25", "pass 1/q"),
    ("lens.q", {"uniform": [0.0, 0.5]}, "must lie in (0, 1]", "got 0.0"),
    ("lens.theta_E", {"normal": [1.5, 0.4, -0.3, 2.7]}, "lens.theta_E must be positive", "-0.3"),
    ("lens.theta_E", "abc", "lens.theta_E: input should be a valid number", 'got "abc"'),
    ("lens.theta_E", float("nan"), "lens.theta_E: input should be a finite number", "got NaN"),
    ("lens.z_lens", 0.0, "lens.z_lens must be positive", "0.0"),
    ("lens.phi", {"uniform": [2.0, 1.0]}, "low < high", "got [2.0, 1.0]"),
    ("lens.phi", {"normal": [0.0, -1.0, 0.0, 1.0]}, "sd > 0 and low < high", "got [0.0, -1.0, 0.0, 1.0]"),
    ("lens.phi", {"normal": [9.0, 0.1, 0.0, 1.0]}, "hardly ever falls in [0.0, 1.0]", "mean 9.0 and sd 0.1"),
    ("source.z", 0.4, "the source must lie behind the lens", "source.z reaches down to 0.4 and lens.z_lens up to 0.5"),
    ("subhalos.z_lens", 2.0, "the source must lie behind the lens", "down to 1.77 and subhalos.z_lens up to 2"),
    ("source.cut", 0.0, "source.cut: input should be greater than 0", "got 0.0"),
    ("cosmology", "Planck2018", "input should be 'Planck18' or 'WMAP9'", 'got "Planck2018"'),
    ("subhalos.mass_function", "decade", "input should be 'power-law' or 'decades'", 'got "decade"'),
    ("training.loss", "l1", "input should be 'mse' or 'mae'", 'got "l1"'),
    ("source.sigma", 0.0, "source.sigma must be positive", "0.0"),
    ("subhalos.mass_min", 2e11, "subhalos.mass_min must be below subhalos.mass_max", "got 2e+11 and 1.7e+11 Msun"),
    ("subhalos.mass_min", 0.0, "subhalos.mass_min: input should be greater than 0", "got 0.0"),
    ("subhalos.mass_fraction", 1.5, "subhalos.mass_fraction: input should be less than or equal to 1", "got 1.5"),
    ("subhalos.compensation", "shet", "input should be 'none' or 'sheet'", 'got "shet"'),
    ("camera.num_pixels", 60.5, "camera.num_pixels: input should be a valid integer", "got 60.5"),
    ("camera.num_pixels", "60", "camera.num_pixels: input should be a valid integer", 'got "60"'),
    ("camera.num_pixels", 3, "greater than or equal to 4", "got 3"),
    ("camera.psf_sigma", 7.0, "smaller than the frame of 6 arcsec", "got 7 arcsec. It is in arcsec, not in pixels"),
    ("camera.signal_to_noise", 0.0, "camera.signal_to_noise: input should be greater than 0", "got 0.0"),
    ("camera.noise_reference", "sky", "input should be 'frame' or 'peak'", 'got "sky"'),
    ("camera.normalise", "yes", "camera.normalise: input should be a valid boolean", 'got "yes"'),
    ("camera.supersampling", 0, "greater than or equal to 1", "got 0"),
    ("engine", "galsim", "input should be 'numba' or 'lenstronomy'", 'got "galsim"'),
    ("seed", -1, "seed: input should be greater than or equal to 0", "got -1"),
    ("name", "My Run", "name: string should match pattern", 'got "My Run"'),
    ("num_images.train", 0, "num_images.train: input should be greater than or equal to 1", "got 0"),
    ("model.kernel_size", 4, "model.kernel_size must be odd", "got 4"),
    ("model.filters", [], "model.filters: tuple should have at least 1 item", "got []"),
    ("model.dropout", 1.0, "model.dropout: input should be less than 1", "got 1.0"),
    ("training.batch_size", 1, "training.batch_size: input should be greater than or equal to 2", "got 1"),
    ("training.optimizer", "sgd", "input should be 'adam' or 'nadam'", 'got "sgd"'),
]

UNKNOWN_KEYS = [
    ("camera.num_pixel", "did you mean camera.num_pixels?"),
    ("num_pixels", "did you mean camera.num_pixels?"),
    ("training.num_epoch", "did you mean n_cnn.training.num_epochs?"),
    ("camera", "camera is a group of values, not a value; set one of camera.num_pixels,"),
    ("frobnicate", "there is no frobnicate; known are name,"),
]

# A second legal value for every field of a Simulation.
OTHER_VALUES = {
    "engine": "lenstronomy",
    "seed": 1,
    "source.z": 2.0,
    "subhalos.alpha": -2.0,
    "subhalos.compensation": "sheet",
    "camera.signal_to_noise": None,
    "camera.noise_reference": "peak",
    "camera.normalise": False,
    "camera.num_pixels": 61,
    "camera.supersampling": 2,
    "output.catalogue": True,
    "cosmology": "WMAP9",
    "subhalos.mass_function": "decades",
    "camera.bits": 8,
    "subhalos.mass_min": 1e9,
    "subhalos.mass_max": 1e11,
}


@pytest.mark.parametrize(("key", "value", "must_hold", "arrived"), REFUSALS)
def test_refusal_says_what_must_hold_and_what_arrived(key, value, must_hold, arrived):
    """A setting is refused when it is built, in one line that a person can act on; not hours later, on a worker."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is what is tested below
        Experiment().override({key: value})

    message = str(refusal.value)
    assert must_hold in message
    assert arrived in message
    assert "\n" not in message


def test_bits_need_a_range():
    """Pixels in units of the source's brightness have no highest value to be rounded against."""
    with pytest.raises(ValueError, match=r"^camera\.bits rounds pixels between 0 and 1, so it needs"):
        Experiment().override({"camera.bits": 8, "camera.normalise": False})


def test_a_setting_that_came_later_renames_no_dataset():
    """Somebody has a million images under the old name, and they are the same images."""
    before = Simulation().as_dict()
    del before["subhalos"]["mass_total"]

    assert Simulation.parse(before).digest == Simulation().digest
    assert Simulation().identity() == before
    assert Simulation().override({"subhalos.mass_total": 1e12}).identity()["subhalos"]["mass_total"] == 1e12


@pytest.mark.parametrize("name", ["loss", "labels", "seed"])
def test_what_changes_the_meaning_of_an_error_is_not_searched(name):
    """A table ranked by losses of two kinds would rank nothing."""
    with pytest.raises(ValueError, match=f"there is no hyper-parameter {name}"):
        Search.parse({"name": "s", "network": "n-cnn", "epochs": [1, 2], "values": {name: [0, 1]}})


@pytest.mark.parametrize(("key", "hint"), UNKNOWN_KEYS)
def test_unknown_key_is_refused_with_the_nearest(key, hint):
    """`--num-epoch 50` must never silently do nothing."""
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is what is tested below
        Experiment().override({key: 5})

    assert hint in str(refusal.value)


def test_unknown_key_in_nested_settings_is_refused_with_the_nearest():
    """A recipe file takes this way in, past override."""
    with pytest.raises(ValueError, match=r"no camera.num_pixls; did you mean camera.num_pixels\?"):
        Experiment.parse({"simulation": {"camera": {"num_pixls": 3}}})


def test_settings_are_frozen():
    """A digest that outlives a change of its settings names the wrong dataset."""
    with pytest.raises(ValueError, match="frozen"):
        Simulation().seed = 1


def test_digests_are_the_published_ones():
    """They name datasets that people keep: a change means that a default or SIMULATOR_VERSION changed.

    If either was meant to, raise SIMULATOR_VERSION where rows changed, and put the new digests here.
    """
    digests = {name: recipe().simulation.digest for name, recipe in recipes.RECIPES.items()}

    assert digests == {
        "smoke": "187662a2",
        "paper-fixed": "187662a2",
        "paper-fixed-coarse": "e9993320",
        "paper-varied": "961587a2",
        "coded-fixed": "53f429e7",
        "coded-fixed-coarse": "a3528743",
        "coded-varied": "e32dea8d",
    }


@pytest.mark.parametrize("key", keys(Simulation))
def test_digest_changes_with_every_setting_of_the_simulation(key):
    """Two datasets with one name would be mixed, shard by shard."""
    assert Simulation().override({key: OTHER_VALUES.get(key, 0.3)}).digest != Simulation().digest


def test_digest_does_not_change_with_what_makes_no_pixel():
    """The search trains many networks on one dataset."""
    changes = {
        "name": "other",
        "num_images.train": 7,
        "model.dense": 64,
        "training.seed": 3,
        "n_cnn.model.filters": [8],
    }

    assert Experiment().override(changes).simulation.digest == Experiment().simulation.digest


def test_digest_does_not_change_with_the_way_a_number_is_written():
    """TOML's 2 and 2.0 are one redshift."""
    assert Simulation().override({"source.z": 2}).digest == Simulation().override({"source.z": 2.0}).digest


def test_override_of_a_network_reaches_both_or_the_one_that_is_named():
    """`training.num_epochs` in a recipe means the experiment; `n_cnn.` in front picks one."""
    both = Experiment().override({"training.num_epochs": 4, "model.dropout": 0.1})
    one = Experiment().override({"n_cnn.training.num_epochs": 4})

    assert [both.n_cnn.training.num_epochs, both.alpha_cnn.training.num_epochs] == [4, 4]
    assert [both.n_cnn.model.dropout, both.alpha_cnn.model.dropout] == [0.1, 0.1]
    assert [one.n_cnn.training.num_epochs, one.alpha_cnn.training.num_epochs] == [4, 100]


def test_later_override_wins():
    """The command line's options are applied in the order in which they were given."""
    experiment = Experiment().override({"training.seed": 1, "alpha_cnn.training.seed": 2})

    assert [experiment.n_cnn.training.seed, experiment.alpha_cnn.training.seed] == [1, 2]


def test_override_of_the_simulation_needs_no_prefix():
    """Both spellings are one setting, and nothing beside it changes."""
    short, full = (Experiment().override({key: 30}) for key in ("camera.num_pixels", "simulation.camera.num_pixels"))

    assert short == full
    assert short.override({"camera.num_pixels": 60}) == Experiment()


def test_distribution_replaces_a_number_and_a_number_a_distribution():
    """A quantity is one value, whatever its kind: no half of the old one survives."""
    varied = Experiment().override({"lens.q": {"normal": [0.78, 0.12, 0.2, 1.0]}})

    assert varied.simulation.lens.q == Normal(normal=(0.78, 0.12, 0.2, 1.0))
    assert varied.override({"lens.q": 0.78}) == Experiment()


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_experiment_survives_dictionary_and_json(recipe):
    """This is how it travels to workers, into manifests and back."""
    experiment = recipes.load(recipe)

    assert Experiment.parse(experiment.as_dict()) == experiment
    assert Experiment.parse(json.loads(json.dumps(experiment.as_dict()))) == experiment


@unhurried
@given(
    u=st.floats(0, 1, exclude_max=True),
    mean=st.floats(-3, 3),
    sd=st.floats(0.1, 3),
    low=st.floats(-3, 3),
    width=st.floats(0.1, 6),
)
def test_normal_quantile_agrees_with_scipy(u, mean, sd, low, width):
    """Every varied quantity is drawn by it; truncation must rescale the probability and not heap it at the ends."""
    high = low + width
    ends = (low - mean) / sd, (high - mean) / sd
    assume(stats.norm.cdf(ends[1]) - stats.norm.cdf(ends[0]) > 1e-4)

    value = quantile(Normal(normal=(mean, sd, low, high)), np.array([u]))

    # Compared as probabilities: far out their last bits, which a double has not, would move the value.
    np.testing.assert_allclose(stats.truncnorm.cdf(value, *ends, loc=mean, scale=sd), u, rtol=0, atol=1e-10)
    assert low <= value[0] <= high


@unhurried
@given(u=st.floats(0, 1, exclude_max=True), low=st.floats(-3, 3), width=st.floats(0.1, 6))
def test_uniform_and_fixed_quantiles_are_what_they_say(u, low, width):
    """Uniform alpha is the paper's prior; a plain number ignores chance."""
    u = np.array([u])

    np.testing.assert_allclose(quantile(Uniform(uniform=(low, low + width)), u), low + width * u, rtol=1e-12)
    np.testing.assert_array_equal(quantile(low, u), [low])


def test_training_to_test_images_is_five_to_one():
    """Section 2.2, and the sizes of section 2.1 for the sets with alpha held."""
    num_images = Experiment().num_images

    assert num_images.of("train") == 5 * num_images.of("test") == 100_000
    assert {num_images.of(split) for split in SPLITS if split.startswith("test-alpha")} == {5_000}


def test_recipes_are_named_as_they_are_called():
    """A dataset's name starts with its recipe's."""
    assert {name: recipe().name for name, recipe in recipes.RECIPES.items()} == {name: name for name in recipes.RECIPES}


TOML = """
base = "paper-varied"
name = "rounder"
[simulation.lens]
q = {uniform = [0.9, 1.0]}
[simulation.camera]
num_pixels = 30
"""
CHANGES = {"name": "rounder", "lens.q": {"uniform": [0.9, 1.0]}, "camera.num_pixels": 30}


def test_recipe_file_with_a_base_changes_what_it_names(tmp_path):
    """The rest is the base's; and a distribution is replaced whole, or it would be normal and uniform at once."""
    path = tmp_path / "rounder.toml"
    path.write_text(TOML)

    assert recipes.load(str(path)) == recipes.paper_varied().override(CHANGES)


def test_recipe_file_without_a_base_is_an_experiment_in_full(tmp_path):
    """What `raylens show` prints can be kept, changed and run again; it adds the digest for people."""
    experiment = recipes.paper_varied().override(CHANGES)
    path = tmp_path / "rounder.json"
    path.write_text(json.dumps(experiment.as_dict() | {"digest": experiment.simulation.digest}))

    assert recipes.load(str(path)) == experiment


def test_recipe_file_may_be_based_on_a_recipe_file(tmp_path):
    """A study is a file, and each of its cases a file of one line."""
    first, second = tmp_path / "first.toml", tmp_path / "second.json"
    first.write_text(TOML)
    second.write_text(json.dumps({"base": str(first), "simulation": {"seed": 5}}))

    assert recipes.load(str(second)) == recipes.paper_varied().override(CHANGES | {"seed": 5})


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.toml", "base = ", "a.toml is not TOML:"),
        ("a.json", "[1]", "a.json must hold a table of settings"),
        ("a.toml", 'base = "smok"', "smok is no recipe, no .toml or .json file and no dataset; did you mean smoke?"),
        ("a.toml", "[simulation.lens]\nq = 1.25", "must lie in (0, 1]; got 1.25"),
    ],
)
def test_recipe_file_that_describes_no_experiment_is_refused(tmp_path, name, content, complaint):
    """In one line that says what is wrong with it."""
    path = tmp_path / name
    path.write_text(content)

    with pytest.raises(ValueError) as refusal:  # noqa: PT011 - the message is what is tested below
        recipes.load(str(path))

    assert complaint in str(refusal.value)
