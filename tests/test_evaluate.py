"""Evaluation with Ray: it tests the networks that stand, wherever one stands oneself, and says what it cost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import make_run

from raylens import baselines, evaluate, learning, models, shards, storage
from raylens.dataset import Dataset
from raylens.metrics import Sums
from raylens.report import report

EXAMPLE = json.loads(Path(__file__).with_name("results_example.json").read_text())


@pytest.fixture(scope="module")
def data(make_dataset, tiny, tmp_path_factory) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("data"), tiny, num_images=20, split="test"))


@pytest.fixture
def runs(tmp_path) -> dict[str, str]:
    """Two networks that nobody trained."""
    return {name: make_run(tmp_path / name, name.replace("_", "-"), 8) for name in ("n_cnn", "alpha_cnn")}


def rmse_of(run: str, data: Dataset) -> float:
    """The RMSE of an N-CNN, measured here."""
    tables = [shards.read(uri, ["image", "num_subhalos"])[:num] for uri, num in data.parts]
    image_BHW = torch.from_numpy(np.concatenate([shards.images(table) for table in tables]))
    true_B = torch.from_numpy(np.concatenate([table["num_subhalos"].to_numpy() for table in tables])).float()
    return Sums.of(*learning.validate(models.load(run, "n-cnn"), [learning.Block(image_BHW, true_B, true_B)])).rmse


def test_runs_may_be_named_from_the_folder_in_which_one_stands(data, runs, tmp_path, monkeypatch, ray_cluster):
    """The workers of a cluster stand in another."""
    monkeypatch.chdir(tmp_path)

    results = evaluate.evaluate([data], n_cnn="n_cnn", alpha_cnn="alpha_cnn")

    assert {name: results[name]["run"] for name in runs} == runs


def test_a_network_trained_again_in_the_same_folder_predicts_anew(data, runs, tmp_path, ray_cluster):
    """Workers live as long as the driver, and must not remember the network that stood there before."""
    evaluate.evaluate([data], **runs)
    make_run(tmp_path / "n_cnn", "n-cnn", 8)

    results = evaluate.evaluate([data], **runs)

    assert results["datasets"][0]["n_cnn"]["rmse"] == pytest.approx(rmse_of(runs["n_cnn"], data), rel=1e-6)


def test_the_first_rows_of_a_larger_dataset_are_a_dataset(data, runs, make_dataset, tiny, tmp_path, ray_cluster):
    """A recipe says how many images it is on, and more may stand."""
    small = Dataset.open(make_dataset(tmp_path, tiny, num_images=10, split="test"))

    first, alone = (evaluate.evaluate([of], **runs) for of in (Dataset.open(data.uri, 10), small))

    for results in (first, alone):
        results["datasets"][0].pop("dataset")
    assert first["datasets"] == alone["datasets"]
    assert first["datasets"][0]["num_images"] == 10


def structure(values):
    """The names in nested dictionaries, at whatever depth; what stands in a list is like its first."""
    if isinstance(values, dict):
        return {key: structure(value) for key, value in values.items() if key != "versions"}
    if isinstance(values, list) and values and isinstance(values[0], dict):
        return [structure(values[0])]
    return None


def test_the_example_of_the_report_s_tests_holds_what_an_evaluation_writes(data, runs, ray_cluster):
    """Otherwise the page is tested on what no longer is."""
    for run in runs.values():
        record = models.read_card(run, Path(run).name.replace("_", "-")).metrics
        Path(run, "metrics.jsonl").write_text(json.dumps(record) + "\n")

    results = evaluate.evaluate([data], **runs, true_n=True)

    results["illustration"] = EXAMPLE["illustration"]  # a dataset may hold none
    assert structure(json.loads(json.dumps(results))) == structure(EXAMPLE)


def test_baselines_are_measured_on_the_truth_of_the_test_set(data, runs, ray_cluster):
    """Against another column, or other rows, any number would look as good."""
    card = models.read_card(runs["alpha_cnn"], "alpha-cnn")
    labels = data.read(["alpha", "num_subhalos", "subhalo_theta_E", "theta_E"])
    fitted = {
        "alpha_from_true_n": baselines.fit(labels["alpha"], {"num_subhalos": labels["num_subhalos"]}),
        "alpha_from_ring": baselines.fit(labels["alpha"], {"subhalo_theta_E": labels["subhalo_theta_E"]}),
    }
    weights = storage.read(f"{runs['alpha_cnn']}/model.safetensors")
    models.save(runs["alpha_cnn"], weights, card.model_copy(update={"baselines": card.baselines | fitted}))

    measured = evaluate.evaluate([data], **runs)["datasets"][0]["baselines"]

    for name, baseline in fitted.items():
        errors = baseline.predict(labels, 20) - labels["alpha"]
        assert measured[name]["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), rel=1e-6)


def test_an_evaluation_says_what_it_cost(data, runs, ray_cluster):
    """Its report lays that beside the training's."""
    results = evaluate.evaluate([data], **runs)

    cost = results["cost"]
    assert cost.keys() == {"seconds", "cpu_seconds", "gpu_seconds", "images_per_second"}
    assert 0 < cost["cpu_seconds"] < 10 * cost["seconds"]
    assert cost["images_per_second"] == pytest.approx(20 / cost["seconds"])
    assert '<th scope="row">evaluate</th><td>' in report([results])


def test_a_slope_that_is_held_has_no_gradient(tiny, make_dataset, runs, tmp_path, ray_cluster):
    """A recipe may fix alpha: predictions have no slope against a truth that does not vary, and the page says so."""
    fixed = make_dataset(tmp_path, tiny.override({"subhalos.alpha": -1.9}), split="test")

    results = evaluate.evaluate([Dataset.open(fixed)], **runs)

    headline = evaluate.headline(results)
    assert headline["alpha_gradient"] is None
    assert headline["alpha_rmse"] > 0
    assert "e+" not in report([results]).split("<h3>Results</h3>")[0]
