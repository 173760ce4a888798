"""What is known of a campaign: its trials, how they went, which is the best; `campaign.json`.

Trials are called by their number in the order in which they were proposed, `00000` first. A trial's metric is
the lowest value of any of its epochs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, Literal

from raylens import recipes, storage
from raylens.config import Experiment, Network, Search, Settings, Simulation
from raylens.search import Configuration, Searcher, network_of


class Tried(Settings):
    """A trial."""

    id: str
    config: Configuration
    status: Literal["running", "completed", "stopped", "failed"]  # stopped: by the searcher, as not worth more epochs
    reason: str | None = None  # of a failure
    metric: float | None = None
    epoch: int | None = None  # that the metric is of
    epochs: int = 0  # that it was trained
    values: tuple[float, ...] = ()  # of the metric, after each epoch
    seconds: float = 0.0  # of training and validation


class Campaign(Settings):
    """A campaign, as far as it has come."""

    search: Search
    searcher: Searcher
    base: Network  # the recipe's settings, which hold for what is not searched
    num_trials: int  # that it ends with
    dataset: str  # URI
    dataset_digest: str
    validation_dataset: str | None  # None: a tenth of the dataset, held out
    num_pixels: int
    num_training_images: int
    num_validation_images: int
    num_possible: int  # configurations
    left_out: dict[str, int]  # why, and how many
    reference: Configuration | None  # the recipe's own settings; None where the space does not hold them
    trials: tuple[Tried, ...] = ()
    best: Tried | None = None
    seconds: float = 0.0  # of all calls
    cpu_seconds: float = 0.0  # trained on CPUs, one for each trial
    gpu_seconds: float = 0.0  # trained on GPUs: a trial's share of one, times how long
    busy: float = 0.0  # seconds in trials over slots times seconds, of the last call
    num_slots: int = 0  # trials at once
    versions: dict[str, str]

    def ranked(self) -> list[Tried]:
        """Return the trials that have a metric, the best first; one that failed later counts as well."""
        return sorted((trial for trial in self.trials if trial.metric is not None), key=_metric)

    def reference_rank(self) -> int | None:
        """Return the place of the recipe's own settings among the trials, from 1; None if they were not tried."""
        places = (place for place, trial in enumerate(self.ranked(), start=1) if trial.config == self.reference)
        return next(places, None)


def _metric(trial: Tried) -> float:
    assert trial.metric is not None
    return trial.metric


def place(campaign: str) -> str:
    """Return the URI of a campaign's record."""
    return storage.join(campaign, "campaign.json")


def folder(campaign: str, trial: str) -> str:
    """Return the URI of a trial's folder."""
    return storage.join(campaign, "trials", trial)


def read(campaign: str) -> Campaign | None:
    """Return a campaign as it stands, or None where there is none; ValueError if what stands is not one."""
    content = storage.read_if_there(place(campaign))
    if content is None:
        return None
    try:
        return Campaign.parse(json.loads(content))
    except ValueError as error:
        raise ValueError(f"{place(campaign)} does not describe a campaign: {error}") from None


def write(campaign: str, record: Campaign) -> None:
    """Put a campaign's record in its place."""
    storage.write(place(campaign), json.dumps(record.as_dict(), indent=1) + "\n")


def best_so_far(values: Iterable[float]) -> list[float]:
    """Return the lowest of the values up to each of them."""
    return list(accumulate(values, min))


def winning_recipe(record: Campaign, simulation: Simulation, recipe: str) -> dict[str, Any]:
    """Return the recipe file that trains the best network at full length."""
    assert record.best is not None
    known = recipes.load(recipe) if recipe in recipes.RECIPES else Experiment(name=recipe, simulation=simulation)
    network = network_of(record.search, record.base, record.best.config)
    field = "n_cnn" if record.search.network == "n-cnn" else "alpha_cnn"
    return {**known.as_dict(), "simulation": simulation.as_dict(), field: network.as_dict()}
