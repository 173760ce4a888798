"""The paper's tables 1 to 4 (section 3), and which of them the results of a simulation may stand beside.

A table fits where the pixels are the same and the geometry is fixed, or varied, as in the paper;
in which other settings an experiment is not the paper's is told by `differences`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from raylens import recipes
from raylens.config import Experiment

NUM_PARAMETERS = 1_671_393, 3_687_522  # of the N-CNN and the alpha-CNN for 60 x 60 pixels: figure 4

# A gradient, a sigma, an RMSE; None where the paper has a dash.
Measures = dict[str, float | None]


@dataclass(frozen=True)
class Table:
    """What the paper says of one network on one kind of images."""

    title: str
    figure: str  # that draws the same predictions
    experiment: Experiment
    measures: dict[float | None, Measures]  # by alpha; None: varied


_FIGURE_AND_RECIPE: dict[str, tuple[str, Callable[[], Experiment]]] = {
    "table_1": ("Figure 5", recipes.paper_fixed),
    "table_2": ("Figure 6", recipes.paper_fixed_coarse),
    "table_3": ("Figure 7", recipes.paper_varied),
    "table_4": ("Figure 8", recipes.paper_varied),
}


def tables(simulation: dict[str, Any]) -> dict[str, Table]:
    """Return the table that fits a simulation for each of n_cnn, alpha_cnn and alpha_cnn_true_n that has one."""
    camera = simulation["camera"]
    fitting = {}
    everything = json.loads(files("raylens").joinpath("paper_tables.json").read_text(encoding="utf-8"))["tables"]
    for key, table in everything.items():
        same_pixels = camera["num_pixels"] == table["num_pixels"]
        same_scale = math.isclose(camera["pixel_scale"], table["pixel_scale_arcsec"])
        if not (same_pixels and same_scale and geometry(simulation) == table["lens_geometry"]):
            continue
        figure, recipe = _FIGURE_AND_RECIPE[key]
        for network in ("n_cnn", "alpha_cnn"):
            measures = {
                None if row["alpha"] == "varied" else row["alpha"]: row[network]
                for row in table["rows"]
                if network in row
            }
            if measures:
                name = f"{network}_true_n" if table["alpha_cnn_number_input"] == "true" else network
                fitting[name] = Table(key.replace("_", " ").capitalize(), figure, recipe(), measures)
    return fitting


def geometry(simulation: dict[str, Any]) -> str | None:
    """Return "fixed" or "varied", as the paper means it; None where only lesser things vary."""
    lens, source = simulation["lens"], simulation["source"]
    if isinstance(lens["theta_E"], dict) or isinstance(source["z"], dict):
        return "varied"
    return None if any(isinstance(value, dict) for value in (*lens.values(), *source.values())) else "fixed"


def differences(results: dict[str, Any], experiment: Experiment) -> dict[str, tuple[Any, Any]]:
    """Return the settings, under dotted keys, in which results are not an experiment's: here and there.

    Seeds, the engine and what is stored beside the images make no difference.
    """
    num_images = {"train": results["n_cnn"]["num_training_images"]}
    for entry in results["datasets"]:
        num_images["test" if entry["alpha"] is None else "test_alpha"] = entry["num_images"]
    networks = {name: {key: results[name][key] for key in ("model", "training")} for name in ("n_cnn", "alpha_cnn")}
    here = flat({"simulation": results["simulation"], "num_images": num_images, **networks})
    there = flat(experiment.as_dict())
    return {
        key: (value, there[key])
        for key, value in here.items()
        if key in there and value != there[key] and not key.endswith((".seed", ".engine", ".catalogue"))
    }


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys; a distribution is one value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and not {"uniform", "normal"} & value.keys():
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
