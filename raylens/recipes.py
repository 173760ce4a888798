"""Which values: the recipes by name, or an experiment from a recipe file or from a dataset.

A recipe starts from another and changes what it is about. A recipe file (TOML or JSON) holds
an Experiment, in full or as the changes to the recipe that it names as its `base`.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from raylens import storage
from raylens.config import Experiment, NumImages, Simulation

_VARIED: dict[str, Any] = {
    "lens.theta_E": {"normal": [1.5, 0.4, 0.3, 2.7]},
    "lens.q": {"normal": [0.78, 0.12, 0.2, 1.0]},
    "lens.phi": {"uniform": [0.0, math.pi]},
    "lens.x": {"uniform": [-0.1, 0.1]},
    "lens.y": {"uniform": [-0.1, 0.1]},
    "source.z": {"normal": [1.77, 0.75, 1.0, 6.0]},
}

# What the released code of the paper does where its text says otherwise or nothing.
_CODED: dict[str, Any] = {
    "cosmology": "WMAP9",
    "source.sigma": 0.42,
    "source.cut": 1.42,
    "subhalos.mass_function": "decades",
    "subhalos.mass_min": 1e8,
    "subhalos.mass_max": 1e11,
    "subhalos.h": 0.8,
    "subhalos.z_lens": 1.0,
    "camera.psf_sigma": 0.0,
    "camera.signal_to_noise": 101.0,
    "camera.noise_reference": "peak",
    "camera.bits": 8,
    "training.num_epochs": 30,
    "n_cnn.model.dropout": 0.05,
    "n_cnn.training.labels": "unit",
    "alpha_cnn.training.loss": "mae",
}


def paper_fixed() -> Experiment:
    """The paper's fixed lens geometry at 0.1 arcsec: table 1 and figure 5."""
    return Experiment()


def paper_fixed_coarse() -> Experiment:
    """The paper's fixed lens geometry at 0.2 arcsec: table 2 and figure 6."""
    return paper_fixed().override(
        {"name": "paper-fixed-coarse", "camera.num_pixels": 30, "camera.pixel_scale": 0.2, "camera.psf_sigma": 0.14}
    )


def paper_varied() -> Experiment:
    """The paper's varied lens geometry at 0.1 arcsec: tables 3 and 4, figures 7 and 8."""
    return paper_fixed().override({"name": "paper-varied", **_VARIED})


def coded_fixed() -> Experiment:
    """The fixed geometry at 0.1 arcsec as the paper's released code has it (docs/paper.md): table 1."""
    return paper_fixed().override({"name": "coded-fixed", **_CODED, "lens.q": 1.3**-2, "lens.phi": math.pi / 2})


def coded_fixed_coarse() -> Experiment:
    """The fixed geometry at 0.2 arcsec as the paper's released code has it: table 2."""
    return coded_fixed().override({"name": "coded-fixed-coarse", "camera.num_pixels": 30, "camera.pixel_scale": 0.2})


def coded_varied() -> Experiment:
    """The varied geometry at 0.1 arcsec as the paper's released code has it (docs/paper.md): tables 3 and 4."""
    return paper_varied().override(
        {
            "name": "coded-varied",
            **_CODED,
            "subhalos.mass_total": 1.44e12,
            "source.z": {"normal": [1.77, 0.75, 1.01, 6.0]},  # no source may lie as near as the subhaloes' z_lens
        }
    )


def smoke() -> Experiment:
    """The paper's fixed-geometry experiment, small enough for a laptop and five minutes."""
    return paper_fixed().override(
        {
            "name": "smoke",
            "num_images.train": 20_000,
            "num_images.validation": 2_000,
            "num_images.test": 4_000,
            "num_images.test_alpha": 1_000,
            "training.num_epochs": 2,
            "training.batch_size": 32,
            "training.learning_rate": 5e-4,
        }
    )


RECIPES: dict[str, Callable[[], Experiment]] = {
    "smoke": smoke,
    "paper-fixed": paper_fixed,
    "paper-fixed-coarse": paper_fixed_coarse,
    "paper-varied": paper_varied,
    "coded-fixed": coded_fixed,
    "coded-fixed-coarse": coded_fixed_coarse,
    "coded-varied": coded_varied,
}


def load(recipe: str) -> Experiment:
    """Return the experiment that a recipe's name, a recipe file or a dataset describes.

    Raises
    ------
    ValueError
        If it is none of them, or a file that does not describe an experiment.
    """
    if recipe in RECIPES:
        return RECIPES[recipe]()
    if recipe.endswith((".toml", ".json")):
        return _from_file(recipe)
    if may_be_dataset(recipe) and storage.exists(storage.join(recipe, "dataset.json")):
        return _from_dataset(storage.join(recipe, "dataset.json"))
    close = difflib.get_close_matches(recipe, RECIPES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"the recipes are {', '.join(RECIPES)}."
    raise ValueError(f"{recipe} is no recipe, no .toml or .json file and no dataset; {hint}")


def load_with_networks(recipe: str) -> Experiment:
    """Return the experiment that a recipe describes, if it says which networks to train.

    Raises
    ------
    ValueError
        If it does not: a dataset made from a recipe file knows the name of that alone.
    """
    experiment = load(recipe)
    if may_be_dataset(recipe) and experiment.name not in RECIPES:
        raise ValueError(
            f"{recipe} was made from a recipe file, {experiment.name}, which also says how to train: `raylens train "
            "--recipe FILE`, `raylens reproduce FILE`. With --recipe paper-fixed it is trained as in the paper."
        )
    return experiment


def may_be_dataset(recipe: str) -> bool:
    """Return whether a recipe can only be a dataset, being no name and no file."""
    return recipe not in RECIPES and not recipe.endswith((".toml", ".json"))


def _from_dataset(plan: str) -> Experiment:
    """Return the recipe by which a dataset was made, with its simulation and as many images of its split."""
    try:
        values = storage.read_json(plan)
        experiment = RECIPES.get(values["recipe"], Experiment)()
        experiment = experiment.model_copy(
            update={"name": values["recipe"], "simulation": Simulation.parse(values["simulation"])}
        )
        return experiment.override({f"num_images.{NumImages.field_of(values['split'])}": values["num_images"]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{plan} is not a dataset's: it lacks {error}.") from None
    except ValueError as error:
        raise ValueError(f"{plan} is not a dataset's: {error}") from None


def _from_file(uri: str) -> Experiment:
    text = storage.read(uri).decode()
    try:
        values = tomllib.loads(text) if uri.endswith(".toml") else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{uri} is not {PurePosixPath(uri).suffix[1:].upper()}: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{uri} must hold a table of settings, as `raylens show smoke` prints it.")
    values.pop("digest", None)  # `raylens show` adds it for people; it follows from the rest
    base = values.pop("base", None)
    return Experiment.parse(values if base is None else _merge(load(base).as_dict(), values))


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings with those in `new` replaced; a distribution is one value."""
    merged = dict(old)
    for key, value in new.items():
        group = isinstance(value, dict) and isinstance(old.get(key), dict) and not {"uniform", "normal"} & value.keys()
        merged[key] = _merge(old[key], value) if group else value
    return merged
