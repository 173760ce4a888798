"""Predictions of test sets to `results.json`: the paper's measures, baselines, and all that the figures need.

The measures of section 3 stand for each dataset beside what no image is needed for (`models.BASELINES`), as
fitted on the training labels. Distributions are kept as histograms, so that a report needs neither images
nor predictions.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from raylens import dataset, models, predict, storage
from raylens.config import SPLITS, support
from raylens.dataset import Dataset
from raylens.metrics import measure

_NUM_BINS = 60

# What each network predicts.
_TARGETS = {"n_cnn": "num_subhalos", "alpha_cnn": "alpha", "alpha_cnn_true_n": "alpha"}

# The lens parameters of figure 1.
_GEOMETRY = ["theta_E", "q", "phi", "x", "y", "z_source"]


def evaluate(
    test_sets: list[Dataset],
    *,
    n_cnn: str,
    alpha_cnn: str,
    true_n: bool = False,
    progress: predict.Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Return the results of two trained networks on some test sets, ready for JSON.

    With `true_n` also those of the alpha-CNN given the true N (table 4).

    Raises
    ------
    ValueError
        If the images of a test set are not as those that the networks were trained on, in size, scale or units.
    """
    started = time.perf_counter()
    n_cnn, alpha_cnn = storage.absolute(n_cnn), storage.absolute(alpha_cnn)
    n_card, alpha_card = models.read_card(n_cnn, "n-cnn"), models.read_card(alpha_cnn, "alpha-cnn")
    predictions, cpu_seconds = predict.predict_with_truth(
        test_sets, n_cnn=n_cnn, alpha_cnn=alpha_cnn, progress=progress
    )
    entries = [
        _evaluate_one(data, columns, n_card, alpha_card, true_n)
        for data, columns in zip(test_sets, predictions, strict=True)
    ]
    illustration = storage.join(test_sets[0].uri, "illustration.json")
    seconds = time.perf_counter() - started
    return {
        "recipe": n_card.recipe,
        "simulation": test_sets[0].plan.simulation.as_dict(),
        "digest": test_sets[0].plan.digest,
        "n_cnn": {"run": n_cnn, **n_card.as_dict(), "history": _history(n_cnn)},
        "alpha_cnn": {"run": alpha_cnn, **alpha_card.as_dict(), "history": _history(alpha_cnn)},
        "datasets": entries,
        "illustration": storage.read_json(illustration) if storage.exists(illustration) else None,
        "cost": {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "gpu_seconds": 0.0,
            "images_per_second": sum(data.num_images for data in test_sets) / seconds,
        },
        "versions": dataset.versions(),
    }


def headline(results: dict[str, Any]) -> dict[str, float | None]:
    """Return the numbers by which a run is told from another: those of the first set with alpha varied.

    A gradient is None where the truth does not vary.
    """
    varied = next((entry for entry in results["datasets"] if entry["alpha"] is None), results["datasets"][0])
    return {
        "n_gradient": varied["n_cnn"]["gradient"],
        "n_rmse": varied["n_cnn"]["rmse"],
        "alpha_gradient": varied["alpha_cnn"]["gradient"],
        "alpha_rmse": varied["alpha_cnn"]["rmse"],
    }


def _evaluate_one(
    data: Dataset, columns: dict[str, np.ndarray], n_card: models.Card, alpha_card: models.Card, true_n: bool
) -> dict[str, Any]:
    if not true_n:
        del columns["alpha_cnn_true_n"]
    truth = columns | data.read(["lens_mass", "theta_E", "subhalo_theta_E"])
    networks = {name: target for name, target in _TARGETS.items() if name in columns}
    split = data.plan.split
    low, high = support(data.plan.simulation.subhalos.alpha)
    held = SPLITS[split] if SPLITS[split] is not None or low < high else low
    return {
        "dataset": data.uri,
        "digest": data.plan.digest,
        "split": split,
        "alpha": held,  # None: varied
        "num_images": data.num_images,
        **{name: measure(truth[target], columns[name]) for name, target in networks.items()},
        "baselines": {
            name: measure(truth[card.target], baseline.predict(truth, data.num_images))
            for card in (n_card, alpha_card)
            for name, baseline in card.baselines.items()
        },
        "figures": {
            name: _figures(truth[target], columns[name], scatter=held is None) for name, target in networks.items()
        },
        "truth": {
            "num_subhalos": _histogram(columns["num_subhalos"]),
            "alpha": _histogram(columns["alpha"]),
            **{name: _histogram(values) for name, values in data.read(_GEOMETRY).items()},
        },
    }


def _figures(true: np.ndarray, predicted: np.ndarray, *, scatter: bool) -> dict[str, Any]:
    """Return what figures 5 to 8 draw: the errors and, where alpha varies, the density of predicted against true."""
    drawn = {"errors": _histogram(predicted.astype(np.float64) - true)}
    if scatter:
        edges = _edges(np.concatenate([true, predicted]))
        density, _, _ = np.histogram2d(true, predicted, bins=(edges, edges))
        drawn["scatter"] = {"edges": edges.tolist(), "counts": density.astype(int).tolist()}  # counts[true][predicted]
    return drawn


def _histogram(values: np.ndarray) -> dict[str, Any]:
    edges = _edges(values)
    counts, _ = np.histogram(values, bins=edges)
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _edges(values: np.ndarray) -> np.ndarray:
    """Return equal bins over the values, without a thousandth at either end that would stretch them."""
    low, high = np.quantile(values, [0.001, 0.999])
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, _NUM_BINS + 1)


def _history(run: str) -> list[dict[str, Any]]:
    """Return the epochs of a run, as its metrics.jsonl has them."""
    place = storage.join(run, "metrics.jsonl")
    return [json.loads(line) for line in storage.read(place).splitlines()] if storage.exists(place) else []
