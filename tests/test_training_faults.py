"""Whatever happens to workers, nodes and drivers, training ends, and in the losses of a run that nothing disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raylets import cluster, descendants, raylet, title

from raylens import models, train
from raylens.config import Model, Network, Simulation, Training
from raylens.dataset import Dataset

SIMULATION = Simulation().override({"camera.num_pixels": 12, "camera.pixel_scale": 0.5, "camera.psf_sigma": 0.0})
NUM_EPOCHS = 12
NETWORK = Network(
    model=Model(filters=(4,), kernel_size=3, dense=16), training=Training(num_epochs=NUM_EPOCHS, learning_rate=1e-3)
)
# In a process of its own, with a checkpoint at each look at the clock: one in the midst of an epoch.
TRAIN = """
import sys
from raylens import cli, train
train._SECONDS_BETWEEN_CHECKPOINTS = float(sys.argv[1])
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset) -> Dataset:
    """A hundred and twenty-five steps an epoch."""
    root = tmp_path_factory.mktemp("data")
    return Dataset.open(make_dataset(root, SIMULATION, num_images=2223, shard_size=256))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory, ray_cluster) -> list[tuple[float, float]]:
    """The losses of a run in which nothing happened."""
    run = str(tmp_path_factory.mktemp("runs") / "undisturbed")
    train.train("n-cnn", NETWORK, run, data=data, recipe="tiny")
    return losses(run)


@pytest.fixture
def often(monkeypatch) -> None:
    """A checkpoint at each look at the clock."""
    monkeypatch.setattr(train, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)


def history(run: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def losses(run: str | Path) -> list[tuple[float, float]]:
    return [(record["train_loss"], record["validation_loss"]) for record in history(run)]


def command(
    data: Dataset, run: Path, num_epochs: int = NUM_EPOCHS, *more: str, batch_size: int = 16, seconds: float = 0.0
) -> list[str]:
    settings = {
        "model.filters": [4], "model.kernel_size": 3, "model.dense": 16,
        "training.num_epochs": num_epochs, "training.learning_rate": 1e-3, "training.batch_size": batch_size,
    }  # fmt: skip
    changes = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    where = ["--data", data.uri, "--to", str(run), "--recipe", "smoke"]
    return [sys.executable, "-c", TRAIN, str(seconds), "train", "n-cnn", *where, *changes, *more]


def wait_until(true: Callable[[], Any], running: subprocess.Popen, timeout: float = 200) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := true()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def workers(pid: int) -> list[int]:
    """The processes that train, below another."""
    return [child for child in descendants(pid) if "TrainWorker" in title(child)]


def num_epochs(run: Path) -> int:
    return len(history(run)) if (run / "metrics.jsonl").exists() else 0


def test_a_killed_worker_is_replaced_and_nothing_is_lost(data, undisturbed, often, tmp_path):
    """The new one goes on from the last checkpoint, which lies within an epoch."""
    killed = []

    def kill(record: dict[str, Any]) -> None:
        if not killed:
            killed.extend(workers(os.getpid()))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    train.train("n-cnn", NETWORK, str(tmp_path / "run"), data=data, recipe="tiny", progress=kill)

    assert killed
    assert losses(tmp_path / "run") == undisturbed


def test_a_killed_driver_is_resumed_within_an_epoch(data, undisturbed, tmp_path):
    """The same losses to the digit: optimiser, random state and position in the data are in the checkpoint."""
    run = tmp_path / "run"
    with subprocess.Popen(command(data, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as training:
        # A file of the random state is written in the midst of an epoch only.
        wait_until(lambda: num_epochs(run) >= 2 and list(run.glob("checkpoints/*/random-0.safetensors")), training)
        started = list(descendants(training.pid))
        training.kill()
        training.communicate()
        for pid in started:  # what it began would end by itself, but later
            if title(pid):
                os.kill(pid, signal.SIGKILL)
    stood = num_epochs(run)
    resumed = subprocess.run(
        [*command(data, run), "--resume"], capture_output=True, text=True, timeout=300, check=False
    )

    assert resumed.returncode == 0, resumed.stderr
    assert 2 <= stood < NUM_EPOCHS
    assert losses(run) == undisturbed


def test_a_training_that_diverges_stops_at_once_and_says_where(data, tmp_path, ray_cluster):
    """A night of NaN helps nobody."""
    network = NETWORK.override({"training.learning_rate": 1e30, "training.num_epochs": 100000})

    with pytest.raises(ValueError, match=r"diverged: the loss in epoch 1 is not a finite number by step 64 of 126"):
        train.train("n-cnn", network, str(tmp_path / "run"), data=data, recipe="tiny")


def test_a_training_that_no_longer_improves_stops(data, tmp_path, ray_cluster):
    """With no learning rate to speak of the first epoch is as good as any."""
    network = NETWORK.override({"training.learning_rate": 1e-30, "training.patience": 2, "training.num_epochs": 99})

    trained = train.train("n-cnn", network, str(tmp_path / "run"), data=data, recipe="tiny")

    assert trained.num_epochs == trained.epoch + 2 < 99


def test_an_image_that_is_not_finite_is_refused_by_its_index(data, make_dataset, tmp_path, ray_cluster):
    """It would turn every weight into NaN. `verify` finds the changed shard; training need not wait for that."""
    uri = make_dataset(tmp_path, SIMULATION, num_images=40, shard_size=20)
    place = f"{uri}/part-00001.parquet"
    table = pq.read_table(place)
    pixels = np.array(table["image"].combine_chunks().flatten().flatten())
    pixels[144 * 7 + 5] = np.nan
    lines = pa.FixedSizeListArray.from_arrays(pa.array(pixels), 12)
    column = pa.FixedSizeListArray.from_arrays(lines, 12)
    pq.write_table(table.set_column(table.column_names.index("image"), "image", column), place)

    with pytest.raises(ValueError, match=r"part-00001\.parquet holds an image, of index 27, with pixels"):
        train.train("n-cnn", NETWORK, str(tmp_path / "run"), data=Dataset.open(uri), validation=data, recipe="tiny")


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"model.filters": (8,)}, r"model\.filters is \[4\] there and \[8\] here"),
        ({"training.batch_size": 32}, r"training\.batch_size is 16 there and 32 here"),
    ],
)
def test_going_on_otherwise_than_begun_is_refused(data, tmp_path, ray_cluster, changes, difference):
    """Half of the epochs of one experiment and half of another are no experiment."""
    run = str(tmp_path / "run")
    train.train("n-cnn", NETWORK.override({"training.num_epochs": 1}), run, data=data, recipe="tiny")

    with pytest.raises(ValueError, match=rf"was begun otherwise: {difference}"):
        train.train("n-cnn", NETWORK.override(changes), run, data=data, recipe="tiny", resume=True)


def test_what_does_not_fit_in_memory_is_streamed(data, tmp_path):
    """A dataset larger than the node's memory trains all the same, and the run says how."""
    run = tmp_path / "run"
    little = os.environ | {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 2, "memory": 1_000_000})}

    ran = subprocess.run(command(data, run, 2), capture_output=True, text=True, timeout=300, env=little, check=False)

    assert ran.returncode == 0, ran.stderr
    assert [record["share"] for record in history(run)] == ["streamed"] * 2
    assert models.read_card(str(run), "n-cnn").share == "streamed"


@pytest.mark.slow
def test_two_workers_learn_what_one_does(data, tmp_path, ray_cluster):
    """Each normalises its half of a batch by itself, so the digits differ, but not what is learnt: to a tenth."""
    network = NETWORK.override({"training.batch_size": 32, "model.dropout": 0.0})
    one, two = (
        train.train("n-cnn", network, str(tmp_path / str(count)), data=data, recipe="tiny", num_workers=count)
        for count in (1, 2)
    )

    assert two.validation_rmse == pytest.approx(one.validation_rmse, rel=0.1)
    assert [record["num_workers"] for record in history(tmp_path / "2")] == [2] * NUM_EPOCHS


@pytest.mark.slow
def test_a_node_that_dies_takes_a_worker_with_it_and_the_rest_goes_on(data, tmp_path):
    """Two nodes with a worker each; one dies, and another comes: the group shrinks and grows."""
    run = tmp_path / "run"
    with cluster({"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1}) as (nodes, others):
        joined = os.environ | {"RAY_ADDRESS": nodes.address}
        with subprocess.Popen(
            command(data, run, 200, "--num-workers", "1:2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=joined,
        ) as training:  # fmt: skip
            wait_until(lambda: num_epochs(run) >= 3, training)
            nodes.remove_node(others[2], allow_graceful=False)
            wait_until(lambda: history(run)[-1]["num_workers"] == 1, training)
            nodes.add_node(num_cpus=1)
            out, errors = training.communicate(timeout=500)

    assert training.returncode == 0, errors
    counts = [record["num_workers"] for record in history(run)]
    assert [record["epoch"] for record in history(run)] == list(range(1, 201))
    assert (counts[0], min(counts)) == (2, 1)
    assert json.loads(out.splitlines()[-1])["num_epochs"] == 200


@pytest.mark.slow
def test_a_node_that_is_about_to_go_gives_away_what_it_has_learnt(data, tmp_path):
    """A spot machine is drained with a deadline; another takes over within the epoch."""
    run, once = tmp_path / "run", tmp_path / "undisturbed"
    with cluster({"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1}) as (nodes, others):
        joined = os.environ | {"RAY_ADDRESS": nodes.address}
        # A thousand steps an epoch, and by the clock no checkpoint before the end of one: only the warning makes it.
        words = {"num_epochs": 20, "batch_size": 2, "seconds": 1e6}
        subprocess.run(command(data, once, **words), check=True, capture_output=True, timeout=300, env=joined)
        with subprocess.Popen(
            command(data, run, **words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=joined
        ) as training:
            wait_until(lambda: num_epochs(run) >= 2, training)
            assert not list(run.glob("checkpoints/*/random-0.safetensors"))
            (home,) = [node for node in others[1:] if workers(raylet(node))]
            subprocess.run(
                [
                    str(Path(sys.executable).parent / "ray"), "drain-node", "--address", nodes.address,
                    "--node-id", home.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                    "--reason-message", "spot", "--deadline-remaining-seconds", "15",
                ],
                check=True, capture_output=True, env=joined, timeout=60,
            )  # fmt: skip
            wait_until(lambda: list(run.glob("checkpoints/*/random-0.safetensors")), training)
            _, errors = training.communicate(timeout=500)

    assert training.returncode == 0, errors
    assert losses(run) == losses(once)
