"""A campaign on a real Ray: what it leaves behind, what it survives, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from raylets import cluster, descendants, title

from raylens import campaign as campaigns
from raylens import recipes, search, storage, train, tune
from raylens.campaign import Campaign
from raylens.config import Search, Simulation
from raylens.dataset import Dataset
from raylens.search import Searcher

SIMULATION = Simulation().override({"camera.num_pixels": 12, "camera.pixel_scale": 0.5, "camera.psf_sigma": 0.0})


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset) -> Dataset:
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("data"), SIMULATION, num_images=320, shard_size=64))


def space(epochs: tuple[int, int] = (1, 4), **values: list) -> Search:
    """Small networks; those of the recipe are larger."""
    searched = {
        "learning_rate": [1e-4, 1e-3, 1e-2],
        "batch_size": [16, 32],
        "num_layers": [1, 2],
        "kernel_size": [3],
        "filters": [4, 8],
        "growth": [2],
        "dense": [16],
    }
    return Search.parse(
        {"name": "small", "network": "n-cnn", "recipe": "smoke", "epochs": epochs, "values": searched | values}
    )


def read(campaign: Path | str) -> Campaign:
    record = campaigns.read(str(campaign))
    assert record is not None
    return record


def history(campaign: Path | str, trial: str) -> list[dict[str, Any]]:
    content = storage.read(storage.join(campaigns.folder(str(campaign), trial), "metrics.jsonl"))
    return [json.loads(line) for line in content.splitlines()]


def wait_until(true: Callable[[], Any], running: subprocess.Popen, timeout: float = 120) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := true()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


@pytest.mark.parametrize("searcher", get_args(Searcher))
def test_each_searcher_ends_with_as_many_trials_as_were_asked_for(searcher, data, tmp_path, ray_cluster):
    """The record, the curves and the best agree, and nothing of Ray's is left."""
    campaign = str(tmp_path / "campaign")

    tuned = tune.tune(space(), campaign, data=data, searcher=searcher, num_trials=6)

    record = read(campaign)
    assert [trial.id for trial in record.trials] == [f"{k:05}" for k in range(6)]
    for trial in record.trials:
        epochs = history(campaign, trial.id)
        assert trial.status == ("completed" if len(epochs) == 4 else "stopped")
        assert trial.values == tuple(one["validation_rmse"] for one in epochs)
        assert trial.metric == min(trial.values)
        assert trial.epochs == epochs[-1]["epoch"] == len(epochs)
    assert any(trial.status == "completed" for trial in record.trials)
    assert record.best == min(record.trials, key=lambda trial: trial.metric)
    assert tuned.best == record.best.as_dict()
    assert 0 < tuned.cpu_seconds <= tuned.seconds * tuned.num_slots
    assert set(os.listdir(campaign)) == {"campaign.json", "trials", "tensorboard", "winner.json", "report.html"}
    assert all(os.listdir(f"{campaign}/tensorboard/{trial.id}") for trial in record.trials)
    assert not list(Path(campaign).rglob("checkpoint*"))


def test_one_of_a_population_goes_on_as_another_one(data, tmp_path, ray_cluster):
    """Also as a network of other layers; its curve is then that of the weights that it has."""
    campaign = str(tmp_path / "campaign")
    searched = space((1, 8), learning_rate=[1e-5, 1e-2], batch_size=[16])
    seen: dict[str, set] = {}

    def look(record: Campaign) -> None:
        for trial in record.trials:
            seen.setdefault(trial.id, set()).add((trial.config["num_layers"], trial.config["filters"]))

    tune.tune(searched, campaign, data=data, searcher="pbt", num_trials=6, progress=look)

    assert any(len(networks) > 1 for networks in seen.values())
    for trial in read(campaign).trials:
        assert (trial.status, trial.epochs) == ("completed", 8)
        assert trial.values == tuple(one["validation_rmse"] for one in history(campaign, trial.id))


def test_the_winner_can_be_trained(data, tmp_path, ray_cluster):
    """It is what a campaign is for; its recipe is an experiment in full."""
    campaign = str(tmp_path / "campaign")
    tuned = tune.tune(space(epochs=(2, 2)), campaign, data=data, searcher="random", num_trials=2)

    winner = recipes.load(tuned.recipe)
    run = train.train("n-cnn", winner.n_cnn, str(tmp_path / "run"), data=data, recipe=winner.name)

    layers = [tuned.best["config"]["filters"] * 2**layer for layer in range(tuned.best["config"]["num_layers"])]
    assert list(winner.n_cnn.model.filters) == layers
    assert winner.n_cnn.training.learning_rate == tuned.best["config"]["learning_rate"]
    assert winner.simulation == SIMULATION
    # A trial is that training, with one thread, which adds up in another order.
    assert run.validation_rmse == pytest.approx(tuned.best["metric"], rel=1e-3)


def test_what_fails_is_recorded_with_its_reason_and_ends_nothing(data, tmp_path, ray_cluster):
    """One diverges, and one is larger than any memory."""
    campaign = str(tmp_path / "campaign")
    values = {
        "learning_rate": [1e-3, 1e30],
        "dense": [16, 1 << 45],
        "batch_size": [16],
        "num_layers": [1],
        "filters": [4],
    }

    tuned = tune.tune(space(**values), campaign, data=data, searcher="grid")

    record = read(campaign)
    status = {(one.config["learning_rate"], one.config["dense"]): (one.status, one.reason) for one in record.trials}
    assert status[1e-3, 16] == ("completed", None)
    assert status[1e30, 16][0] == status[1e-3, 1 << 45][0] == "failed"
    assert "diverged: the loss in epoch 1" in status[1e30, 16][1]
    assert "memory" in status[1e-3, 1 << 45][1]
    assert (tuned.num_trials, tuned.num_failed) == (4, 3)
    assert tuned.best["config"] == record.trials[0].config


@pytest.mark.slow  # it takes gigabytes
def test_a_trial_that_ray_ends_for_memory_is_recorded_and_ends_nothing(data, tmp_path, cli):
    """Before the system does; the others have their turn."""
    file, campaign = tmp_path / "space.json", tmp_path / "campaign"
    values = {"learning_rate": [1e-3, 1e-4], "batch_size": [16], "num_layers": [1], "filters": [4]}
    file.write_text(json.dumps(space(dense=[16, 6_000_000], **values).as_dict()))
    memory = {
        name.rstrip(":"): int(kB) for name, kB, *_ in map(str.split, Path("/proc/meminfo").read_text().splitlines())
    }
    left = memory["MemAvailable"] - 3_500_000  # 6 million times 144 weights are as much

    ran = cli(
        *("tune", str(file), "--data", data.uri, "--to", str(campaign), "--searcher", "grid"),
        RAY_memory_usage_threshold=f"{1 - left / memory['MemTotal']:.4f}",
    )

    assert ran.returncode == 0, ran.stderr
    for trial in read(campaign).trials:
        if trial.config["dense"] == 16:
            assert trial.status == "completed"
        else:
            assert trial.status == "failed"
            assert re.search(r"^\d worker\(s\) were killed due to the node running low on memory", trial.reason)


def test_a_trial_whose_process_is_killed_is_taken_up_again(data, tmp_path, ray_cluster):
    """A node may go, or the system take a process's memory back; the trial is not to blame."""
    campaign = str(tmp_path / "campaign")
    killed = []

    def kill(record: Campaign) -> None:
        if not killed and any(trial.epochs == 2 for trial in record.trials):
            killed.extend(pid for pid in descendants(os.getpid()) if "Trainable" in title(pid))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    tune.tune(space(epochs=(6, 6)), campaign, data=data, searcher="random", num_trials=4, progress=kill)

    assert killed
    assert [(trial.status, trial.epochs) for trial in read(campaign).trials] == [("completed", 6)] * 4


@pytest.mark.parametrize(
    ("searcher", "where"),
    [
        ("asha", "s3"),
        pytest.param("asha", "local", marks=pytest.mark.slow),
        pytest.param("grid", "local", marks=pytest.mark.slow),
        pytest.param("optuna", "local", marks=pytest.mark.slow),
        pytest.param("pbt", "local", marks=pytest.mark.slow),
    ],
)
def test_a_campaign_whose_driver_is_killed_is_finished_and_nothing_repeated(
    searcher, where, data, tmp_path, s3, ray_cluster
):
    """What has ended stays as it is, to the digit, and what had not goes on."""
    campaign = str(tmp_path / "campaign") if where == "local" else f"{s3}/campaign-{time.time_ns()}"
    file = tmp_path / "space.json"
    searched = space(epochs=(2, 8))
    file.write_text(json.dumps(searched.as_dict()))
    words = ["tune", str(file), "--data", data.uri, "--to", campaign, "--searcher", searcher, "--num-trials", "8"]

    def some_have_ended() -> bool:
        record = campaigns.read(campaign)
        ended = [trial for trial in record.trials if trial.status != "running"] if record else []
        return len(ended) >= (1 if searcher == "pbt" else 3)

    with subprocess.Popen([sys.executable, "-m", "raylens", *words], stderr=subprocess.PIPE, text=True) as running:
        wait_until(some_have_ended, running)
        running.kill()
        running.communicate()
    before = read(campaign)
    curves = {trial.id: history(campaign, trial.id) for trial in before.trials if trial.status != "running"}
    done, again = (
        tune.tune(searched, campaign, data=data, searcher=searcher, num_trials=8, resume=True) for _ in range(2)
    )

    after = read(campaign)
    assert len(curves) < 8
    assert done.num_trials == len(after.trials) == 8
    assert all(trial.status in ("completed", "stopped") for trial in after.trials)
    for trial, epochs in curves.items():
        assert history(campaign, trial) == epochs
    assert [one for one in after.trials if one.id in curves] == [one for one in before.trials if one.id in curves]
    assert len({json.dumps(trial.config) for trial in after.trials}) == 8 or searcher == "pbt"
    assert again.cpu_seconds == 0
    assert again.busy == done.busy > 0
    assert again.best == done.best


def test_a_campaign_that_goes_on_knows_how_others_did(data, tmp_path, ray_cluster):
    """Successive halving compares with all trials that came to a rung, also those of an earlier call."""
    campaign = str(tmp_path / "campaign")
    searched = space(epochs=(1, 4), learning_rate=[1e-5, 1e-2], batch_size=[16], num_layers=[1], filters=[4, 8])
    first = tune.tune(searched, campaign, data=data, searcher="asha", num_trials=4)
    slots = tune._Slots(1, {"CPU": 1.0})
    watch = tune._Watch(campaign, read(campaign), search.Listed([]), lambda record: None, slots, time.time())
    scheduler = tune._scheduler("asha", searched)

    watch.take_up(scheduler)

    stranger: Any = type("Trial", (), {"trial_id": "stranger"})()
    nobody: Any = None
    scheduler.on_trial_add(nobody, stranger)
    worse = 2 * max(trial.metric for trial in read(campaign).trials)
    assert scheduler.on_trial_result(nobody, stranger, {"epoch": 1, "metric": worse}) == scheduler.STOP
    assert watch.num_open == 0
    assert first.num_trials == 4


def test_a_campaign_can_be_made_longer_but_not_another(data, tmp_path, ray_cluster):
    campaign = str(tmp_path / "campaign")
    tune.tune(space(), campaign, data=data, searcher="random", num_trials=2)

    longer, as_long = (
        tune.tune(space(), campaign, data=data, searcher="random", num_trials=num_trials, resume=True)
        for num_trials in (3, None)
    )

    assert longer.num_trials == as_long.num_trials == 3
    with pytest.raises(ValueError, match=r"stands already; go on with --resume"):
        tune.tune(space(), campaign, data=data, searcher="random")
    with pytest.raises(ValueError, match=r"was begun otherwise: searcher"):
        tune.tune(space(), campaign, data=data, searcher="grid", resume=True)
    with pytest.raises(ValueError, match=r"was begun otherwise: search\.epochs"):
        tune.tune(space(epochs=(1, 5)), campaign, data=data, searcher="random", resume=True)


def test_a_recipe_that_was_changed_meanwhile_is_refused(data, tmp_path, ray_cluster):
    """Its later trials would be compared with others that they are not like."""
    recipe, campaign = tmp_path / "recipe.json", str(tmp_path / "campaign")
    experiment = recipes.load("smoke")
    recipe.write_text(json.dumps(experiment.as_dict()))
    searched = space((1, 1)).override({"recipe": str(recipe)})
    tune.tune(searched, campaign, data=data, searcher="random", num_trials=2)
    recipe.write_text(json.dumps(experiment.override({"n_cnn.model.dropout": 0.5}).as_dict()))

    with pytest.raises(ValueError, match=r"was begun otherwise: base\.model\.dropout"):
        tune.tune(searched, campaign, data=data, searcher="random", num_trials=3, resume=True)


def test_an_image_that_is_not_finite_is_told_before_a_trial_begins(tmp_path, make_dataset, ray_cluster):
    """Each trial would fail of it."""
    spoilt = Dataset.open(make_dataset(tmp_path, SIMULATION, num_images=40, shard_size=20))
    shard, _ = spoilt.parts[1]
    table = pq.read_table(shard)
    pixels = pa.array(np.full(20 * 12 * 12, np.nan, np.float32))
    image = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pixels, 12), 12)
    pq.write_table(table.set_column(table.column_names.index("image"), "image", image), shard)

    with pytest.raises(ValueError, match="pixels that are not finite"):
        tune.tune(space(), str(tmp_path / "campaign"), data=spoilt)

    assert not read(tmp_path / "campaign").trials


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([{"CPU": 2.0}, {"CPU": 6.0}], (8, {"CPU": 1.0})),
        ([{"CPU": 16.0}, {"CPU": 4.0, "GPU": 4.0}], (16, {"CPU": 0.25, "GPU": 0.25})),
        ([{"CPU": 64.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 4.0}], (20, {"CPU": 0.5, "GPU": 0.25})),
    ],
)
def test_there_are_as_many_slots_as_find_room_together(nodes, expected):
    """More would wait for ever beside those that run; CPUs of nodes without a GPU are of no use to a trial on one."""
    slots = tune._slots(nodes, trials_per_gpu=4)

    assert (slots.num, slots.resources) == expected


def test_the_reason_of_a_task_that_raised_is_what_it_raised(tmp_path, ray_cluster):
    """Ray tells of it with a traceback, in colour."""

    @ray.remote
    def task() -> None:
        raise KeyError("the reason")

    with pytest.raises(ray.exceptions.RayTaskError) as told:
        ray.get(task.remote())
    file = tmp_path / "error.txt"
    file.write_text(f"Failure # 1 (occurred at noon)\nanother\nFailure # 2 (occurred at one)\n{told.value}\n")

    assert tune._last_failure(SimpleNamespace(error_file=str(file))) == "KeyError: 'the reason'"


def test_the_recipes_own_network_is_tried_first_and_its_rank_told(data, tmp_path, ray_cluster):
    """How the paper's choice does is what the search is for."""
    searched = space(
        num_layers=[1, 3], filters=[4, 16, 64], kernel_size=[3, 5], dense=[512], learning_rate=[5e-4, 1e-2]
    )

    tuned = tune.tune(searched, str(tmp_path / "campaign"), data=data, searcher="random", num_trials=3)

    record = read(tmp_path / "campaign")
    assert record.trials[0].config == record.reference
    assert record.ranked()[tuned.reference_rank - 1].id == "00000"


def test_wrong_usage_is_told_at_once(data, tmp_path, cli):
    """Before Ray is started, and in one line."""
    file = tmp_path / "space.toml"
    file.write_text('network = "n-cnn"\nname = "mine"\nepochs = [1, 2]\n[values]\nlearning_rat = [1e-3]\n')
    to = ["--data", data.uri, "--to", str(tmp_path / "campaign")]
    wrong = {
        ("tune", "paper-n-cn", *to): "did you mean paper-n-cnn?",
        ("tune", str(file), *to): "did you mean learning_rate?",
        ("tune", "smoke", *to, "--searcher", "hyperband"): "the searchers are grid, random, asha, optuna, pbt",
        ("tune", "smoke", "--to", "x"): "a search needs --data",
        ("tune", "smoke", "--data", str(tmp_path), "--to", "x"): "is no dataset",
        ("tune", "smoke", *to, "--num-trials", "0"): "num-trials",
    }

    for words, message in wrong.items():
        ran = cli(*words, timeout=20)
        assert ran.returncode in (1, 2)
        assert len(ran.errors) == 1
        assert message in ran.errors[0]
    assert not (tmp_path / "campaign").exists()


def test_a_cluster_without_room_for_a_trial_is_refused_at_once(data, tmp_path, cli):
    """Rather than waiting for ever."""
    words = ("tune", "smoke", "--data", data.uri, "--to", str(tmp_path / "campaign"))
    with cluster({"num_cpus": 0}) as (nodes, _):
        no_cpu = cli(*words, RAY_ADDRESS=nodes.address)

    assert no_cpu.returncode == 1
    assert len(no_cpu.errors) == 1
    assert no_cpu.errors[0].startswith("error: no node of the cluster has a CPU for work. Bring nodes first, ")


def test_images_that_shared_memory_cannot_hold_are_refused_with_the_numbers(data, tmp_path, monkeypatch, ray_cluster):
    """Ray would move them to the disk and back, without end."""
    monkeypatch.setattr(tune, "_SHARE_OF_OBJECT_STORE", 1e-9)

    with pytest.raises(ValueError, match=r"the images of .* take 0\.0 GB of the shared memory of a node"):
        tune.tune(space(), str(tmp_path / "campaign"), data=data)
