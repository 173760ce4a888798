"""Training with Ray: what a run holds, that it resumes exactly, and what it refuses."""

import json
import os

import numpy as np
import pytest
import safetensors.torch

from raylens import dataset, models, train
from raylens.config import Model, Network, Simulation, Training

SIMULATION = Simulation().override({"camera.num_pixels": 12, "camera.pixel_scale": 0.5, "camera.psf_sigma": 0.0})
NETWORK = Network(
    model=Model(filters=(4,), kernel_size=3, dense=16), training=Training(num_epochs=2, learning_rate=1e-2)
)


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset) -> str:
    return make_dataset(tmp_path_factory.mktemp("data"), SIMULATION, num_images=150, shard_size=64)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, ray_cluster) -> str:
    """A run of four epochs that nothing interrupted."""
    run = str(tmp_path_factory.mktemp("runs") / "whole")
    train.train("n-cnn", NETWORK.override({"training.num_epochs": 4}), run, data=data, recipe="tiny")
    return run


def history(run: str) -> list[dict]:
    with open(f"{run}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_a_run_holds_what_the_design_says(whole):
    """Others read these files."""
    card = models.read_card(whole, "n-cnn")
    with open(f"{whole}/model.safetensors", "rb") as file:
        names = set(safetensors.torch.load(file.read()))

    assert [record["epoch"] for record in history(whole)] == [1, 2, 3, 4]
    assert names == set(models.build(card).state_dict())
    assert (card.num_training_images, card.num_validation_images) == (135, 15)
    assert os.listdir(f"{whole}/tensorboard")


def test_the_kept_epoch_is_the_one_with_the_lowest_validation_loss(whole):
    """The test set must have no say in which epoch is kept, and the last is seldom the best."""
    best = min(history(whole), key=lambda record: record["validation_loss"])

    assert models.read_card(whole, "n-cnn").epoch == best["epoch"]


def test_resumed_training_equals_uninterrupted_training(whole, data, tmp_path, ray_cluster):
    """Weights, optimiser and random state are in the checkpoint, or the losses would differ."""
    run = str(tmp_path / "resumed")
    train.train("n-cnn", NETWORK, run, data=data, recipe="tiny")

    train.train("n-cnn", NETWORK.override({"training.num_epochs": 4}), run, data=data, recipe="tiny", resume=True)

    losses = [(record["train_loss"], record["validation_loss"]) for record in history(run)]
    assert losses == [(record["train_loss"], record["validation_loss"]) for record in history(whole)]


def test_a_run_that_stands_is_refused_without_resume(whole, data):
    """Overwriting last night's run is no way to start a new one."""
    with pytest.raises(ValueError, match=r"stands already; go on with --resume"):
        train.train("n-cnn", NETWORK, whole, data=data, recipe="tiny")


def test_scaling_and_baselines_come_from_training_labels_alone(whole, data):
    """The held-out tenth, like a test set, must not be known to what it measures."""
    card = models.read_card(whole, "n-cnn")
    labels = dataset.Dataset.open(data).read(["num_subhalos"])["num_subhalos"].astype(float)
    held_out = np.zeros(150, bool)
    held_out[np.random.default_rng(0).choice(150, 15, replace=False)] = True

    assert card.target_scaling.mean == pytest.approx(labels[~held_out].mean())
    assert card.baselines.constant == card.target_scaling.mean != labels.mean()


def test_more_workers_than_the_cluster_holds_are_refused(data, tmp_path, ray_cluster):
    """Otherwise the run waits for ever."""
    with pytest.raises(ValueError, match="8 workers need 9 CPUs"):
        train.train("n-cnn", NETWORK, str(tmp_path / "run"), data=data, recipe="tiny", num_workers=8)
    assert not list(tmp_path.iterdir())


def test_validation_images_of_another_size_are_refused(data, tmp_path, make_dataset):
    """A network takes one size."""
    other = make_dataset(tmp_path, SIMULATION.override({"camera.num_pixels": 10}), split="validation")

    with pytest.raises(ValueError, match=r"images of one size; got 12 pixels .* and 10"):
        train.train("n-cnn", NETWORK, str(tmp_path / "run"), data=data, validation=other, recipe="tiny")
