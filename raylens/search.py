"""Which networks a campaign tries, and in which order: the paper's search spaces (section 2.2), or a file.

A configuration is a value for each hyper-parameter of a space, as a dictionary. What cannot be, such as a
stack of layers that pools the image away, is left out and counted with its reason. All orders follow from
the seed of the search; Optuna's also from what it has been told.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Any, Literal, Protocol

import numpy as np

from raylens import recipes, storage
from raylens.config import LAYERS, SEARCHED_FIELDS, Network, Search

Configuration = dict[str, int | float | str]
Searcher = Literal["grid", "random", "asha", "optuna", "pbt"]
Ended = Literal["completed", "stopped", "failed"]

_MOST_CONFIGURATIONS = 1_000_000
_MOST_REPEATS = 64  # proposals of Optuna that are in vain, one after the other


def paper_n_cnn() -> Search:
    """All that the paper tried (section 2.2), for the N-CNN."""
    return Search.parse(
        {
            "name": "paper-n-cnn",
            "network": "n-cnn",
            "epochs": [10, 100],
            "values": {
                "optimizer": ["adam", "nadam"],
                "learning_rate": [1e-4, 1e-3, 1e-2],
                "batch_size": [8, 16, 32],
                "num_layers": [1, 2, 3, 4, 5, 6],
                "kernel_size": [3, 5, 7, 9, 11],
                "filters": [8, 16, 32, 64, 128],
                "growth": [1, 2],
            },
        }
    )


def paper_alpha_cnn() -> Search:
    """All that the paper tried (section 2.2), for the alpha-CNN."""
    return paper_n_cnn().override({"name": "paper-alpha-cnn", "network": "alpha-cnn"})


def smoke() -> Search:
    """Twelve N-CNNs of the recipe smoke and near it, in a few minutes."""
    return paper_n_cnn().override(
        {
            "name": "smoke",
            "recipe": "smoke",
            "epochs": [1, 4],
            "values": {
                "learning_rate": [5e-4, 5e-3],
                "kernel_size": [3, 5],
                "num_layers": [1, 3],
                "filters": [16, 64],
                "growth": [2],
            },
        }
    )


SPACES: dict[str, Callable[[], Search]] = {
    "smoke": smoke,
    "paper-n-cnn": paper_n_cnn,
    "paper-alpha-cnn": paper_alpha_cnn,
}


def load(space: str) -> Search:
    """Return the search that a space's name or a file (TOML or JSON) describes.

    A file holds a Search, in full or as the changes to the named space that is its `base`; `values` replaces
    the base's as a whole.

    Raises
    ------
    ValueError
        If it is neither, or the file does not describe a search.
    """
    if space in SPACES:
        return SPACES[space]()
    if not space.endswith((".toml", ".json")):
        close = difflib.get_close_matches(space, SPACES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the spaces are {', '.join(SPACES)}."
        raise ValueError(f"{space} is no space and no .toml or .json file; {hint}")
    text = storage.read(space).decode()
    try:
        values = tomllib.loads(text) if space.endswith(".toml") else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{space} is not {PurePosixPath(space).suffix[1:].upper()}: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{space} must hold a table of settings, as `raylens tune smoke --print-space` prints it.")
    base = values.pop("base", None)
    if base not in (None, *SPACES):
        raise ValueError(f"{space}: base must be one of {', '.join(SPACES)}; got {base!r}.")
    return Search.parse(values if base is None else {**SPACES[base]().as_dict(), **values})


def base_network(search: Search) -> Network:
    """Return the settings that hold for what is not searched."""
    experiment = recipes.load(search.recipe)
    return experiment.n_cnn if search.network == "n-cnn" else experiment.alpha_cnn


def network_of(search: Search, base: Network, configuration: Configuration) -> Network:
    """Return the settings of the trial of a configuration, at full length.

    Raises
    ------
    ValueError
        If a value is not of its hyper-parameter's kind.
    """
    changes: dict[str, Any] = {
        SEARCHED_FIELDS[name]: value for name, value in configuration.items() if name not in LAYERS
    }
    if "num_layers" in configuration:
        changes["model.filters"] = _filters(configuration)
    return base.override({**changes, "training.num_epochs": search.epochs[1]})


def _filters(configuration: Configuration) -> list[int]:
    num_layers, first, growth = (int(configuration[name]) for name in LAYERS)
    return [first * growth**layer for layer in range(num_layers)]


def configuration_of(search: Search, network: Network, possible: list[Configuration]) -> Configuration | None:
    """Return which of the configurations that are possible a network's settings are; None if none of them."""
    known = {name: getattr(getattr(network, key.split(".")[0]), name) for name, key in SEARCHED_FIELDS.items()}
    for configuration in possible:
        if all(known[name] == value for name, value in configuration.items() if name not in LAYERS) and (
            "num_layers" not in configuration or tuple(_filters(configuration)) == network.model.filters
        ):
            return configuration
    return None


def searched(search: Search) -> list[str]:
    """Return the hyper-parameters that have more than one value."""
    return [name for name, values in search.values.items() if len(values) > 1]


def spelled_out(search: Search, configuration: Configuration) -> Configuration:
    """Return the values of what is searched, the layers as their filters: 16-32-64."""
    names = searched(search)
    values = {name: configuration[name] for name in names if name not in LAYERS}
    if not set(names).isdisjoint(LAYERS):
        values["filters"] = "-".join(map(str, _filters(configuration)))
    return values


def configurations(search: Search, base: Network, *, num_pixels: int) -> tuple[list[Configuration], dict[str, int]]:
    """Return what can be tried on images of so many pixels, in the order of the values, and how much cannot, and why.

    Raises
    ------
    ValueError
        If nothing can be tried, or a value is not of its hyper-parameter's kind.
    """
    num_products = math.prod(map(len, search.values.values()))
    if num_products > _MOST_CONFIGURATIONS:
        raise ValueError(
            f"the space has {num_products:,} configurations; raylens lists at most {_MOST_CONFIGURATIONS:,}. "
            "Name fewer values."
        )
    for name, values in search.values.items():
        for value in values if name not in LAYERS else ():
            network_of(search, base, {name: value})  # refuses what is of the wrong kind
    possible: list[Configuration] = []
    left_out: Counter[str] = Counter()
    for values in itertools.product(*search.values.values()):
        configuration: Configuration = dict(zip(search.values, values, strict=True))
        reason = _impossible(search, configuration, num_pixels)
        if reason:
            left_out[reason] += 1
        else:
            possible.append(configuration)
    if not possible:
        raise ValueError(f"the space holds no network that can be: {next(iter(left_out))}.")
    return possible, dict(left_out)


def _impossible(search: Search, configuration: Configuration, num_pixels: int) -> str | None:
    """Return why a configuration is left out."""
    if "num_layers" not in configuration:
        return None
    num_layers, first, growth = (int(configuration[name]) for name in LAYERS)
    if num_pixels >> num_layers < 1:
        return f"{num_layers} layers pool images of {num_pixels} pixels away"
    if num_layers == 1 and growth != min(search.values["growth"]):
        return "a single layer does not grow, so it is tried with one growth only"
    most = max(int(value) for value in search.values["filters"])
    if first * growth ** (num_layers - 1) > most:
        return f"the last layers would have more than {most} filters, the most that the space names"
    return None


class Proposals(Protocol):
    """Where the next configuration to try comes from."""

    def next(self) -> Configuration | None:
        """Return a configuration that has not been tried, or None when there is no other."""

    def leave(self, configuration: Configuration) -> None:
        """Do not propose a configuration: it is being tried."""

    def tell(self, configuration: Configuration, values: list[float], ended: Ended) -> None:
        """Learn how a trial went: the metric's lowest value after each epoch, and how it ended."""


class Listed:
    """Configurations in an order that is known beforehand."""

    def __init__(self, configurations: Iterable[Configuration]) -> None:
        self._left = list(configurations)

    def next(self) -> Configuration | None:
        return self._left.pop(0) if self._left else None

    def leave(self, configuration: Configuration) -> None:
        if configuration in self._left:
            self._left.remove(configuration)

    def tell(self, configuration: Configuration, values: list[float], ended: Ended) -> None:
        self.leave(configuration)


class Sampled:
    """Configurations that Optuna's tree-structured Parzen estimator proposes from what it has been told."""

    def __init__(self, search: Search, configurations: list[Configuration]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._space = Space(search)
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=search.seed, constant_liar=True))
        self._asked: dict[str, Any] = {}
        self._study.enqueue_trial(self._space.params(configurations[0]))
        self._left = {_key(configuration): configuration for configuration in configurations}

    def next(self) -> Configuration | None:
        if not self._left:
            return None
        for _ in range(_MOST_REPEATS):
            trial = self._study.ask(self._space.distributions)
            key = _key(self._space.configuration(trial.params))
            if key in self._left:
                self._asked[key] = trial
                return self._left.pop(key)
            # Impossible, or tried already.
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        return self._left.pop(next(iter(self._left)))

    def leave(self, configuration: Configuration) -> None:
        self._left.pop(_key(configuration), None)

    def tell(self, configuration: Configuration, values: list[float], ended: Ended) -> None:
        self.leave(configuration)
        asked = self._asked.pop(_key(configuration), None)
        if asked is not None:
            # Superseded by what is added below, which also serves what was never asked for.
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        states = self._optuna.trial.TrialState
        self._study.add_trial(
            self._optuna.trial.create_trial(
                # One that is pruned without a value counts as the worst, which a failure is.
                state=states.COMPLETE if ended == "completed" else states.PRUNED,
                value=values[-1] if ended == "completed" else None,
                params=self._space.params(configuration),
                distributions=self._space.distributions,
                intermediate_values={} if ended == "failed" else dict(enumerate(values, start=1)),
            )
        )


class Space:
    """A search space in Optuna's terms: numbers by their rank, so that it knows which are neighbours."""

    def __init__(self, search: Search) -> None:
        from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

        self._ranked = {
            name: sorted(values)
            for name, values in search.values.items()
            if all(not isinstance(value, str) for value in values)
        }
        self.distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) if name in self._ranked else CategoricalDistribution(values)
            for name, values in search.values.items()
        }

    def params(self, configuration: Configuration) -> dict[str, Any]:
        """Return a configuration as Optuna has it."""
        return {
            name: self._ranked[name].index(value) if name in self._ranked else value
            for name, value in configuration.items()
        }

    def configuration(self, params: dict[str, Any]) -> Configuration:
        """Return what Optuna proposes as a configuration."""
        return {name: self._ranked[name][value] if name in self._ranked else value for name, value in params.items()}


def proposals(
    searcher: Searcher, search: Search, possible: list[Configuration], first: Configuration | None
) -> Proposals:
    """Return where a searcher's configurations come from; `first` leads all but the grid, which is in order."""
    if searcher == "grid":
        return Listed(possible)
    order = np.random.default_rng(search.seed).permutation(len(possible))
    shuffled = [possible[k] for k in order]
    if first in shuffled:
        shuffled.remove(first)
        shuffled.insert(0, first)
    return Sampled(search, shuffled) if searcher == "optuna" else Listed(shuffled)


def _key(configuration: Configuration) -> str:
    return json.dumps(configuration, sort_keys=True)
