"""The main job on real components, small: every stage, its output, and that nothing is done twice."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pages import Page
from test_cli import make_run

from raylens import generate, models, reproduce, shards, storage
from raylens.config import SPLITS, Experiment
from raylens.dataset import Dataset
from raylens.recipes import smoke

TINY = (
    smoke()
    .override(
        {
            "name": "tiny",
            "camera.num_pixels": 16,
            "camera.pixel_scale": 0.4,
            "model.filters": [4],
            "model.dense": 16,
            "training.num_epochs": 2,
            "num_images.train": 200,
            "num_images.validation": 40,
            "num_images.test": 80,
            "num_images.test_alpha": 20,
        }
    )
    .as_dict()
)
METRICS = {"n_gradient", "n_rmse", "alpha_gradient", "alpha_rmse"}


@pytest.fixture
def recipe(tmp_path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    return str(tmp_path / "tiny.json")


def test_main_job_makes_everything_and_a_second_run_nothing(cli, recipe, tmp_path):
    """One command does all of it; submitting it again is how one goes on."""
    root = tmp_path / "root"
    first = cli("reproduce", recipe, "--to", str(root))
    made = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.suffix in (".parquet", ".safetensors")}

    second = cli("reproduce", recipe, "--to", str(root))

    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    facts = first.facts
    assert facts["metrics"] == second.facts["metrics"]
    assert set(facts["metrics"]) == METRICS
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert Path(facts["report"]).read_text().startswith("<!DOCTYPE html>")
    results = json.loads(Path(facts["results"]).read_text())
    assert [entry["alpha"] for entry in results["datasets"]] == [None, -1.6, -1.8, -2.0, -2.2, -2.4]
    assert {stage["stage"] for stage in results["stages"]} >= {"simulate train", "train n-cnn", "train alpha-cnn"}


def test_results_are_those_of_the_networks_and_test_sets_that_stand(tmp_path, ray_cluster):
    """A network that was trained again must not be told by the numbers of the one before."""
    experiment, root = Experiment.parse(TINY), str(tmp_path / "root")
    first = reproduce.reproduce(experiment, root)
    place = Path(first["results"])
    make_run(Path(first["runs"]["n-cnn"]), "n-cnn", 16, pixel_scale=0.4)

    second = reproduce.reproduce(experiment, root)
    results = json.loads(place.read_text())
    place.write_text(json.dumps(results | {"datasets": results["datasets"][1:]}))
    third = reproduce.reproduce(experiment, root)

    card = models.read_card(first["runs"]["n-cnn"], "n-cnn")
    assert results["n_cnn"]["num_parameters"] == card.num_parameters
    assert second["metrics"]["n_rmse"] != first["metrics"]["n_rmse"]
    assert json.loads(place.read_text())["datasets"] == results["datasets"]
    assert third["metrics"] == second["metrics"]
    assert min(first[name] for name in ("seconds", "cpu_seconds", "images_per_second")) > 0
    assert 0 < second["cpu_seconds"] < first["cpu_seconds"]
    assert first["gpu_seconds"] == second["images_per_second"] == 0

    # More images than the recipe asks for change nothing.
    for split in ("train", "validation", "test"):
        generate.simulate(experiment.simulation, root, recipe="tiny", split=split, num_images=300)
    fourth = reproduce.reproduce(experiment, root)
    shutil.rmtree(first["runs"]["n-cnn"])
    fifth = reproduce.reproduce(experiment, root)

    assert fourth["metrics"] == third["metrics"]
    assert fifth["metrics"] == first["metrics"]


def test_an_experiment_of_which_a_split_cannot_be_drawn_is_refused_at_once(tmp_path):
    """And not at its last test set, after a night."""
    experiment = Experiment.parse(TINY).override({"subhalos.mass_min": 3e6, "subhalos.alpha": -1.6})

    with pytest.raises(ValueError, match=r"split test-alpha-2\.4 would hold about"):
        reproduce.reproduce(experiment, str(tmp_path / "root"))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def both(tmp_path_factory, ray_cluster):
    """Two experiments that differ in their test sets alone, reproduced together."""
    experiment = Experiment.parse(TINY).override({"training.num_epochs": 4, "training.learning_rate": 1e-2})
    other = experiment.override({"name": "other", "num_images.test": 30, "num_images.test_alpha": 10})
    root = str(tmp_path_factory.mktemp("both"))
    return root, reproduce.reproduce_all([experiment, other], root, begin=lambda *stage: lambda *facts: None)


def test_networks_know_nothing_of_the_test_sets(both):
    """Not tuned to the test set: no image of it is trained or validated on, and the epoch is that of validation."""
    facts, without = both[1]["experiments"].values()

    digests = {split: digests_of_images(Dataset.open(uri)) for split, uri in facts["datasets"].items()}
    assert set(digests) == set(SPLITS)
    assert sum(map(len, digests.values())) == len(set.union(*digests.values())) == 200 + 40 + 80 + 5 * 20
    tested = [entry["dataset"] for entry in json.loads(storage.read(facts["results"]))["datasets"]]
    assert tested == [uri for split, uri in facts["datasets"].items() if split.startswith("test")]
    for name, run in facts["runs"].items():
        card = models.read_card(run, name)
        assert (card.dataset, card.validation_dataset) == (facts["datasets"]["train"], facts["datasets"]["validation"])
        history = [json.loads(line) for line in storage.read(f"{run}/metrics.jsonl").splitlines()]
        assert card.epoch == min(history, key=lambda record: record["validation_loss"])["epoch"]
        # Other test sets, and yet the same network of the same epoch.
        assert models.read_card(without["runs"][name], name).epoch == card.epoch
        weights = [storage.read(f"{where['runs'][name]}/model.safetensors") for where in (facts, without)]
        assert weights[0] == weights[1]


def digests_of_images(data: Dataset) -> set[bytes]:
    images = np.concatenate([shards.images(shards.read(uri, ["image"])[:num]) for uri, num in data.parts])
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def test_several_experiments_have_a_folder_each_and_a_report_on_all(both):
    """As the paper has four; each can be gone on with alone."""
    root, facts = both

    assert [facts["experiments"][name]["results"] for name in ("tiny", "other")] == [
        f"{root}/{name}/results.json" for name in ("tiny", "other")
    ]
    assert facts["metrics"] == {name: one["metrics"] for name, one in facts["experiments"].items()}
    rows = Page(Path(facts["report"]).read_text()).table("At a glance")
    assert [row[0][0] for row in rows] == ["tiny", "other"]


def test_several_experiments_of_one_name_are_refused(cli, recipe, tmp_path):
    """The second would go on with the first one's runs."""
    refused = cli("reproduce", recipe, recipe, "--to", str(tmp_path / "root"))

    assert refused.returncode == 1
    assert "each experiment needs a name of its own" in refused.stderr
    assert not (tmp_path / "root").exists()


def test_main_job_runs_on_object_storage(cli, s3, recipe):
    """Datasets, runs with their checkpoints and TensorBoard, results and report: all of it on S3."""
    root = f"{s3}/experiments"

    done = cli("reproduce", recipe, "--to", root)

    assert done.returncode == 0, done.stderr
    run = done.facts["runs"]["n-cnn"]
    assert {"model.json", "model.safetensors", "metrics.jsonl", "tensorboard", "checkpoints"} <= storage.names(run)
    assert storage.names(f"{run}/tensorboard")
    assert json.loads(storage.read(done.facts["results"]))["recipe"] == "tiny"


@pytest.mark.slow
def test_smoke_keeps_its_promises(cli, tmp_path):
    """The recipe that everyone runs first must learn what trial code learnt: docs/paper.md."""
    done = cli("reproduce", "smoke", "--to", str(tmp_path / "root"), timeout=1800)

    assert done.returncode == 0, done.stderr
    metrics = done.facts["metrics"]
    assert metrics["n_gradient"] >= 0.9
    assert metrics["n_rmse"] <= 35
    assert metrics["alpha_rmse"] <= 0.14
