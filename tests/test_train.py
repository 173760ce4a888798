"""Training with Ray: what a run holds, that it resumes exactly, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from raylens import learning, models, shards, train
from raylens.cli import _Epochs, _Talk
from raylens.config import Model, Network, Simulation, Training
from raylens.dataset import Dataset
from raylens.metrics import Sums
from raylens.simulate import simulate_block

SIMULATION = Simulation().override({"camera.num_pixels": 12, "camera.pixel_scale": 0.5, "camera.psf_sigma": 0.0})
NETWORK = Network(
    model=Model(filters=(4,), kernel_size=3, dense=16), training=Training(num_epochs=2, learning_rate=1e-2)
)


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("data"), SIMULATION, num_images=150, shard_size=64))


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


@pytest.mark.parametrize("labels", ["raw", "unit", "standardised"])
def test_labels_are_scaled_and_losses_counted_as_the_settings_say(labels, data, tmp_path, ray_cluster):
    """The paper does not say how it scales N; its released code takes 0 to 1, and the absolute error for alpha."""
    network = NETWORK.override({"training.labels": labels, "training.loss": "mae", "training.num_epochs": 1})
    run = str(tmp_path / "run")

    train.train("n-cnn", network, run, data=data, recipe="tiny")

    card, held_out = models.read_card(run, "n-cnn"), train.held_out_rows(150, network.training.seed)
    n = data.read(["num_subhalos"])["num_subhalos"].astype(float)
    used = n[~held_out]
    offset, scale = {
        "raw": (0, 1), "unit": (used.min(), np.ptp(used)), "standardised": (used.mean(), used.std())
    }[labels]  # fmt: skip
    assert (card.target_scaling.offset, card.target_scaling.scale) == pytest.approx((offset, scale))
    assert card.num_subhalos_scaling == card.target_scaling
    image_BHW = np.concatenate([shards.images(shards.read(uri, ["image"])) for uri, _ in data.parts])[held_out]
    zeros_B = torch.zeros(len(image_BHW))
    predicted_B = learning.predict(models.load(run, "n-cnn"), torch.from_numpy(image_BHW), zeros_B)
    error = np.abs(predicted_B.numpy() - n[held_out]).mean()
    assert history(run)[0]["validation_loss"] == pytest.approx(error / scale, rel=1e-4)
    assert card.loss == "mae"


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


def test_a_run_that_has_ended_is_resumed_by_leaving_it_alone(whole, data):
    """A job that is submitted again must neither wait for nodes nor touch what others read."""
    before = {path: path.stat().st_mtime_ns for path in Path(whole).rglob("*")}
    network = NETWORK.override({"training.num_epochs": 4})

    again = train.train("n-cnn", network, whole, data=data, recipe="tiny", resume=True, num_workers=64)

    assert {path: path.stat().st_mtime_ns for path in Path(whole).rglob("*")} == before
    card = models.read_card(whole, "n-cnn")
    assert (again.epoch, again.validation_loss, again.num_epochs) == (card.epoch, card.metrics["validation_loss"], 4)
    assert again.cpu_seconds == again.images_per_second == 0


def test_a_run_trains_in_the_precision_that_it_is_told(whole, data, tmp_path, ray_cluster):
    """The losses are others than those of float32, but not by much; and the run says so, and goes on in no other."""
    run, network = str(tmp_path / "run"), NETWORK.override({"training.precision": "bfloat16"})

    train.train("n-cnn", network, run, data=data, recipe="tiny")

    losses, others = ([record["train_loss"] for record in history(of)[:2]] for of in (run, whole))
    assert losses != others
    assert losses == pytest.approx(others, rel=0.1)
    assert models.read_card(run, "n-cnn").training.precision == "bfloat16"
    with pytest.raises(ValueError, match=r'training\.precision is "bfloat16" there and "float32" here'):
        train.train("n-cnn", NETWORK, run, data=data, recipe="tiny", resume=True)


def test_a_run_knows_what_all_of_it_cost_and_a_call_what_it_did(data, tmp_path, ray_cluster):
    """A run that was interrupted ten times did not cost what its last hour did."""
    run = str(tmp_path / "run")
    first = train.train("n-cnn", NETWORK, run, data=data, recipe="tiny")
    before = models.read_card(run, "n-cnn")

    second = train.train(
        "n-cnn", NETWORK.override({"training.num_epochs": 3}), run, data=data, recipe="tiny", resume=True
    )

    card, elapsed = models.read_card(run, "n-cnn"), [record["elapsed"] for record in history(run)]
    assert elapsed == sorted(elapsed)
    assert card.seconds == pytest.approx(elapsed[1] + second.seconds)
    assert elapsed[1] < before.seconds == first.seconds
    assert elapsed[2] < card.seconds
    assert card.cpu_seconds == pytest.approx(first.cpu_seconds + second.cpu_seconds)
    assert min(first.cpu_seconds, second.cpu_seconds, second.images_per_second) > 0
    assert card.gpu_seconds == second.gpu_seconds == 0


def test_a_slope_that_is_held_has_no_gradient(make_dataset, tmp_path, capsys, ray_cluster, monkeypatch):
    """A recipe may fix alpha; a gradient of zero would say that the network learnt nothing."""
    fixed = make_dataset(tmp_path, SIMULATION.override({"subhalos.alpha": -1.9}), num_images=40, shard_size=20)

    data, run = Dataset.open(fixed), str(tmp_path / "run")
    monkeypatch.setattr(_Talk, "quiet", False)  # as the last command line here may have left it
    train.train("alpha-cnn", NETWORK, run, data=data, recipe="tiny", progress=_Epochs("alpha-cnn", 2))

    told = capsys.readouterr().err
    assert [record["validation_gradient"] for record in history(str(tmp_path / "run"))] == [None, None]
    assert models.read_card(str(tmp_path / "run"), "alpha-cnn").metrics["validation_gradient"] is None
    assert [line.split()[7] for line in told.splitlines() if " of 2 " in line] == ["-", "-"]


def test_two_workers_validate_the_network_that_is_saved(cli, make_dataset, tiny, tmp_path):
    """Each has batch-normalisation statistics of its own, and the first's are kept."""
    data, run = make_dataset(tmp_path, tiny, num_images=64, shard_size=16), str(tmp_path / "run")
    settings = (
        "model.filters=[4]",
        "model.dense=8",
        "training.num_epochs=4",
        "training.batch_size=4",
        "training.learning_rate=0.01",
    )

    ran = cli(
        "train", "n-cnn", "--data", data, "--to", run, "--recipe", "smoke", "--num-workers", "2",
        *(f"--set={setting}" for setting in settings),
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    rows = np.sort(np.random.default_rng(0).choice(64, 6, replace=False))
    columns = simulate_block(tiny, rows)
    true_B = torch.from_numpy(columns["num_subhalos"]).float()
    block = learning.Block(torch.from_numpy(columns["image"]), true_B, true_B)
    measured = Sums.of(*learning.validate(models.load(run, "n-cnn"), [block])).rmse
    assert models.read_card(run, "n-cnn").metrics["validation_rmse"] == pytest.approx(measured, rel=1e-6)


def test_two_workers_need_no_two_images_to_validate_on(make_dataset, tiny, tmp_path, ray_cluster):
    """A tenth of fifteen images is one, and the first worker has none of it."""
    few, run = Dataset.open(make_dataset(tmp_path, tiny, num_images=15)), str(tmp_path / "run")

    trained = train.train("n-cnn", NETWORK, run, data=few, recipe="tiny", num_workers=2)

    assert trained.num_epochs == 2
    assert models.read_card(run, "n-cnn").num_validation_images == 1


def test_an_interrupted_training_says_how_it_goes_on(data, tmp_path):
    """The same command without --resume is refused."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "raylens", "train", "n-cnn", "--data", data.uri, "--to", str(run)]
    command += ["--recipe", "smoke", "--set", "model.filters=[4]", "--set", "training.num_epochs=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as training:
        while not (run / "metrics.jsonl").exists() and training.poll() is None:
            time.sleep(0.1)
        training.send_signal(signal.SIGINT)
        _, errors = training.communicate(timeout=60)

    assert training.returncode == 1, errors
    assert errors.splitlines()[-1] == "error: interrupted; run the same command with --resume to go on."


def test_a_run_that_stands_is_refused_without_resume(whole, data):
    """Overwriting last night's run is no way to start a new one."""
    with pytest.raises(ValueError, match=r"stands already; go on with --resume"):
        train.train("n-cnn", NETWORK, whole, data=data, recipe="tiny")


def test_scaling_and_baselines_come_from_training_labels_alone(whole, data):
    """The held-out tenth, like a test set, must not be known to what it measures."""
    card = models.read_card(whole, "n-cnn")
    labels = data.read(["num_subhalos"])["num_subhalos"].astype(float)
    held_out = np.zeros(150, bool)
    held_out[np.random.default_rng(0).choice(150, 15, replace=False)] = True

    assert card.target_scaling.offset == pytest.approx(labels[~held_out].mean())
    assert card.baselines["n_constant"].coefficients == [pytest.approx(labels[~held_out].mean(), rel=1e-12)]
    assert labels[~held_out].mean() != pytest.approx(labels.mean())


def test_more_workers_than_the_cluster_holds_are_refused(data, tmp_path, ray_cluster):
    """Otherwise the run waits for ever."""
    with pytest.raises(ValueError, match="8 workers need a CPU each; the cluster has 2 on 1 nodes"):
        train.train("n-cnn", NETWORK, str(tmp_path / "run"), data=data, recipe="tiny", num_workers=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"camera.num_pixels": 10}, r"camera\.num_pixels is 10 there and 12 here"),
        ({"lens.theta_E": 1.2}, r"lens\.theta_E is 1\.2 there and 1\.5 here"),
    ],
)
def test_a_validation_set_of_another_simulation_is_refused(data, tmp_path, make_dataset, changes, difference):
    """It would choose the epoch by another task, and nobody would see."""
    other = make_dataset(tmp_path, SIMULATION.override(changes), split="validation")

    with pytest.raises(
        ValueError, match=rf"is of another simulation than .*: {difference}\. Validate on another split"
    ):
        train.train("n-cnn", NETWORK, str(tmp_path / "run"), data=data, validation=Dataset.open(other), recipe="tiny")
