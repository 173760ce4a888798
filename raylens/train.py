"""Many workers train one network, with Ray Train: epochs, validation, checkpoints, metrics.

Each worker reads its share of the dataset itself, keeps it in memory (on its GPU, if it has one)
or streams it where it does not fit, and shuffles it anew in each epoch. What an epoch does depends
on the seed, its number and the worker's rank alone, so that a resumed run goes on as if it had
never stopped, be it in the middle of an epoch.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed
from ray.train import CheckpointConfig, CheckpointUploadMode, FailureConfig, RunConfig, ScalingConfig

from raylens import __version__, baselines, checkpoint, cluster, dataset, learning, models, shards, share, storage
from raylens.board import Board
from raylens.checkpoint import Position
from raylens.config import Labels, Network
from raylens.dataset import Dataset
from raylens.metrics import Sums

_SECONDS_BETWEEN_CHECKPOINTS = 300.0  # within an epoch; there is one at the end of each
_STEPS_BETWEEN_LOOKS = 64  # at the clock, at the loss, at what the cluster says of this node
_SECONDS_BETWEEN_QUESTIONS = 5.0  # whether a node is about to be taken away
_SHARE_OF_MEMORY = 0.4  # of what a worker can have, for the images that it trains on; a quarter as much for validation
_MOST_CPUS_BESIDE_GPU = 8  # more would wait
_MAX_FAILURES = 3  # of workers; nodes that are taken away with notice are not counted

Progress = Callable[[dict[str, Any]], None]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Trained:
    """What a call of `train` made, and what that cost; the run's own cost, of all calls, is in its card."""

    run: str  # URI
    epoch: int  # whose weights are kept
    validation_loss: float
    validation_rmse: float
    num_epochs: int  # of the run
    num_training_images: int
    seconds: float
    cpu_seconds: float
    gpu_seconds: float
    images_per_second: float  # while training


def train(
    name: models.NetworkName,
    network: Network,
    run: str,
    *,
    data: Dataset,
    validation: Dataset | None = None,
    recipe: str,
    num_workers: int | tuple[int, int] = 1,
    resume: bool = False,
    progress: Progress = lambda record: None,
) -> Trained:
    """Train a network on a dataset and keep the epoch with the lowest validation loss.

    A run that has come to its end, and is to be resumed, is left as it is.

    Parameters
    ----------
    num_workers
        How many train together; a pair: at least and at most, as nodes come and go.

    Raises
    ------
    ValueError
        If the validation set is of another simulation, if the run stands and is not to be resumed or
        was begun with other settings, if there are fewer images than workers, if the cluster is too
        small, if its machines do not share the run's folder, if an image is not finite, or if the training diverges.
    """
    started = time.time()
    run = storage.absolute(run)
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    if validation:
        require_same_simulation(data, validation)
    if not resume and storage.names(run):
        raise ValueError(f"{run} stands already; go on with --resume, or choose another --to.")
    held_out = np.zeros(data.num_images, bool)
    if validation is None:
        held_out = held_out_rows(data.num_images, network.training.seed)
    card = untrained(name, network, held_out, data, validation, recipe, most)
    if card.num_training_images < most:
        raise ValueError(f"{most} workers cannot share {card.num_training_images} images; take fewer workers.")
    _require_same_run(run, card)
    if (ended := _ended(run, card, started)) is not None:
        return ended
    storage.check_writable(run)
    resources = cluster.connect()
    cluster.require_shared(run)
    use_gpu = resources.num_gpus >= least
    room = _require_room(resources, least, most, use_gpu)
    storage.write_if(
        storage.join(run, "run.json"), (json.dumps(card.as_dict(), indent=1) + "\n").encode(), standing=None
    )

    before = _history(run)
    # The time of earlier calls, and when this one began: an epoch's record says how long the run has taken by then.
    clock = {"before": before[-1]["elapsed"] if before else 0.0, "started": started}
    shares = {
        "train": (data.parts, ~held_out),
        "validation": (validation.parts, np.ones(validation.num_images, bool))
        if validation
        else (data.parts, held_out),
    }
    config = {
        "card": card.as_dict(),
        "run": run,
        "clock": clock,
        "shares": shares,
        "num_threads": room.num_cpus,
        "room": int(_SHARE_OF_MEMORY * room.memory),
        "seconds_between_checkpoints": _SECONDS_BETWEEN_CHECKPOINTS,
    }
    with _interruptible(), _following(run, progress):
        result: Any = _trainer(config, (least, most), room, use_gpu).fit()
    if result.return_value is not None:
        raise ValueError(result.return_value)
    return _keep_best(result, card, run, use_gpu, clock, num_before=len(before))


def require_same_simulation(data: Dataset, validation: Dataset) -> None:
    """Refuse to validate on images that were not drawn as those trained on: another task would choose the epoch."""
    apart = {"seed", "engine", "output"}  # with others of these, images are drawn alike
    there, here = (one.plan.simulation.model_dump(mode="json", exclude=apart) for one in (validation, data))
    if there != here:
        raise ValueError(
            f"{validation.uri} is of another simulation than {data.uri}: {shards.difference(there, here)}. "
            "Validate on another split of the same."
        )


def _require_same_run(run: str, card: models.Card) -> None:
    """Refuse to go on with a run that was begun with other settings or on other images."""
    place = storage.join(run, "run.json")
    begun = storage.read_if_there(place)
    if begun is None:
        return
    try:
        here, there = card.as_dict(), models.Card.parse(json.loads(begun)).as_dict()
    except ValueError as error:
        raise ValueError(
            f"{place} is not as this version writes it ({error}); train anew, into another --to."
        ) from None
    for values in (here, there):
        # A run may be made longer, but a schedule knows its length.
        values["training"].pop("patience")
        if values["training"]["schedule"] == "constant":
            values["training"].pop("num_epochs")
    same = ("network", "model", "training", "dataset_digest", "num_training_images", "num_validation_images")
    here, there = ({key: values[key] for key in same} for values in (here, there))
    if here != there:
        raise ValueError(
            f"{run} was begun otherwise: {shards.difference(there, here)}. "
            "Go on as it was begun, or choose another --to."
        )


def _ended(run: str, card: models.Card, started: float) -> Trained | None:
    """Return what a run came to that has ended just so; None where there is something left to train."""
    if not {"model.json", "model.safetensors"} <= storage.names(run):
        return None
    trained = models.read_card(run, card.network)
    if trained.training != card.training:
        return None  # it is to be made longer, or was and has not ended yet
    history = _history(run)
    kept = next(record for record in history if record["epoch"] == trained.epoch)
    return Trained(
        run=run,
        epoch=trained.epoch,
        validation_loss=kept["validation_loss"],
        validation_rmse=kept["validation_rmse"],
        num_epochs=len(history),
        num_training_images=card.num_training_images,
        seconds=time.time() - started,
        cpu_seconds=0.0,
        gpu_seconds=0.0,
        images_per_second=0.0,
    )


def _require_room(resources: cluster.Resources, least: int, most: int, use_gpu: bool) -> cluster.Room:
    """Return what each worker can have; refuse a cluster that cannot hold the least number of them."""
    cluster.require_nodes_for_work()
    room = cluster.room_for(most, use_gpu=use_gpu)
    if not room.num_cpus:
        room = cluster.room_for(least, use_gpu=use_gpu)
    if not room.num_cpus:
        raise ValueError(
            f"{least} workers need a CPU each; the cluster has {resources.num_cpus} on {resources.num_nodes} nodes. "
            "Take fewer workers, or add nodes."
        )
    return cluster.Room(min(room.num_cpus, _MOST_CPUS_BESIDE_GPU), room.memory) if use_gpu else room


def _trainer(
    config: dict[str, Any], num_workers: tuple[int, int], room: cluster.Room, use_gpu: bool
) -> ray.train.torch.TorchTrainer:
    # Ray Train takes one report of a worker each time that it looks, every two seconds: more than an epoch may last.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    file_system, path = storage.arrow_file_system(config["run"])
    least, most = num_workers
    return ray.train.torch.TorchTrainer(
        _train_worker,  # type: ignore[arg-type]  # what it returns is in the result
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=most if least == most else num_workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            # All that it computes with, so that nothing else of Ray's computes there.
            resources_per_worker={"CPU": room.num_cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=file_system,
            # The best, and beside it always the newest.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
            ),
            failure_config=FailureConfig(max_failures=_MAX_FAILURES),
        ),
    )


def _keep_best(
    result: ray.train.Result, card: models.Card, run: str, use_gpu: bool, clock: dict[str, float], *, num_before: int
) -> Trained:
    """Make the weights of the best epoch those of the run."""
    history = _history(run)
    assert result.best_checkpoints is not None
    ended = [pair for pair in result.best_checkpoints if "epoch" in pair[1]]  # not within one
    best, metrics = min(ended, key=lambda pair: pair[1]["validation_loss"])
    kept = next(record for record in history if record["epoch"] == metrics["epoch"])
    with best.as_directory() as folder, open(os.path.join(folder, "model.safetensors"), "rb") as file:
        weights = file.read()
    cpu_seconds = [record["seconds"] * record["num_threads"] * record["num_workers"] for record in history]
    gpu_seconds = [record["seconds"] * use_gpu * record["num_workers"] for record in history]
    seconds = time.time() - clock["started"]
    card = card.override(
        {
            "epoch": kept["epoch"],
            "metrics": {name: value for name, value in kept.items() if name != "share"},
            "seconds": clock["before"] + seconds,
            "cpu_seconds": sum(cpu_seconds),
            "gpu_seconds": sum(gpu_seconds),
            "num_workers": kept["num_workers"],
            "num_threads": kept["num_threads"],
            "share": kept["share"],
            "device": "cuda" if use_gpu else "cpu",
        }
    )
    models.save(run, weights, card)
    new = history[num_before:]
    new_seconds = sum(record["seconds"] for record in new)
    return Trained(
        run=run,
        epoch=card.epoch,
        validation_loss=kept["validation_loss"],
        validation_rmse=kept["validation_rmse"],
        num_epochs=len(history),
        num_training_images=card.num_training_images,
        seconds=seconds,
        cpu_seconds=sum(cpu_seconds[num_before:]),
        gpu_seconds=sum(gpu_seconds[num_before:]),
        images_per_second=len(new) * card.num_training_images / new_seconds if new else 0.0,
    )


def _history(run: str) -> list[dict[str, Any]]:
    """Return the epochs of a run so far."""
    lines = storage.read_if_there(storage.join(run, "metrics.jsonl")) or b""
    return [json.loads(line) for line in lines.splitlines()]


def held_out_rows(num_images: int, seed: int) -> np.ndarray:
    """Return which rows validate where no validation set is given: a seeded tenth."""
    if num_images < 10:
        raise ValueError(f"a tenth of {num_images} images is none to validate on; simulate more or pass --validation.")
    held_out = np.zeros(num_images, bool)
    held_out[np.random.default_rng(seed).choice(num_images, num_images // 10, replace=False)] = True
    return held_out


def untrained(
    name: models.NetworkName,
    network: Network,
    held_out: np.ndarray,
    data: Dataset,
    validation: Dataset | None,
    recipe: str,
    num_workers: int,
) -> models.Card:
    """Return what is known of a network before it is trained; scaling and baselines come from training labels alone."""
    columns = data.read(["index", "num_subhalos", "alpha", "lens_mass", "theta_E", "subhalo_theta_E"])
    used = ~held_out[columns.pop("index")]
    labels = {column: values[used].astype(np.float64) for column, values in columns.items()}
    target = labels[models.TARGETS[name]]
    card = models.Card(
        network=name,
        target=models.TARGETS[name],
        loss=network.training.loss,
        num_pixels=data.num_pixels,
        pixel_scale=data.plan.simulation.camera.pixel_scale,
        normalised=data.plan.simulation.camera.normalise,
        num_parameters=0,
        model=network.model,
        training=network.training,
        target_scaling=_scaling(target, network.training.labels),
        num_subhalos_scaling=_scaling(labels["num_subhalos"], network.training.labels),
        baselines={
            baseline: baselines.fit(target, {column: labels[column] for column in given})
            for baseline, given in models.BASELINES[name].items()
        },
        recipe=recipe,
        dataset=data.uri,
        dataset_digest=data.plan.digest,
        validation_dataset=validation.uri if validation else None,
        num_training_images=int(used.sum()),
        num_validation_images=validation.num_images if validation else int((~used).sum()),
        num_workers=num_workers,
        num_threads=0,
        share="resident",
        device="",
        epoch=0,
        metrics={},
        seconds=0.0,
        cpu_seconds=0.0,
        gpu_seconds=0.0,
        versions={**dataset.versions(), "torch": torch.__version__, "ray": ray.__version__, "raylens": __version__},
    )
    return card.override({"num_parameters": models.num_parameters(models.build(card))})


def _scaling(values: np.ndarray, labels: Labels) -> models.Scaling:
    if labels == "raw":
        return models.Scaling(offset=0.0, scale=1.0)
    # A label that does not vary (a held slope) is left where it is.
    if labels == "unit":
        return models.Scaling(offset=float(values.min()), scale=float(np.ptp(values)) or 1.0)
    return models.Scaling(offset=float(values.mean()), scale=float(values.std()) or 1.0)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Ray Train's handler aborts the run, leaves by sys.exit(0), and stays."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():  # elsewhere Ray Train has set none
            signal.signal(signal.SIGINT, handler)


@contextmanager
def _following(run: str, progress: Progress) -> Iterator[None]:
    """Pass each line that the workers add to metrics.jsonl on while the body runs."""
    stop = threading.Event()
    num_seen = len(_history(run))

    def follow() -> None:
        nonlocal num_seen
        last = False
        while not last:
            last = stop.wait(1.0)
            history = _history(run)
            for record in history[num_seen:]:
                cluster.publish(
                    run,
                    epoch=record["epoch"],
                    train_images_per_second=record["images_per_second"],
                    train_waiting=record["waiting"],
                    validation_loss=record["validation_loss"],
                )
                progress(record)
            num_seen = max(num_seen, len(history))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _train_worker(config: dict[str, Any]) -> str | None:
    """Train on this worker's share, in step with the others; return what made that impossible."""
    learning.compute_with(config["num_threads"])
    torch.backends.cudnn.deterministic = True  # or a resumed run would not be the one that was interrupted
    rank, fault = None, None
    try:
        rank = _Rank(config)
    except ValueError as error:
        fault = str(error)
    # All leave together: one that waits for another that has left would wait for ever.
    faults = [fault] * ray.train.get_context().get_world_size()
    if len(faults) > 1:
        torch.distributed.all_gather_object(faults, fault)
    return next(filter(None, faults), None) or rank.train()  # type: ignore[union-attr]


class _Rank:
    """A worker: its share, its copy of the network, and how far all have come."""

    def __init__(self, config: dict[str, Any]) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.card = config, models.Card.parse(config["card"])
        self.device = ray.train.torch.get_device()
        room = config["room"]
        if self.device.type == "cuda":
            room = int(_SHARE_OF_MEMORY * torch.cuda.mem_get_info(self.device)[0])
        self.share = self._hold("train", room)
        self.validation = self._hold("validation", room // 4)
        training = self.card.training
        self.epoch = share.Epoch(self.card.num_training_images, training.batch_size, self.rank, self.world_size)

        torch.manual_seed(training.seed)
        self.network = learning.on_device(models.build(self.card), self.device)
        self.steps = learning.optimizer(self.network, training)
        self.position = Position(world_size=self.world_size)
        standing = ray.train.get_checkpoint()
        if standing is not None:
            with standing.as_directory() as folder:
                self.position = checkpoint.restore(
                    folder, self.network, self.steps, rank=self.rank, world_size=self.world_size
                )
        self.take_step = learning.Step(
            ray.train.torch.prepare_model(self.network),
            self.network,
            self.steps,
            loss=training.loss,
            precision=training.precision,
            graph=self.device.type == "cuda" and self.world_size == 1,
        )
        self.checkpointed = self.asked = time.monotonic()
        self.warned = False

    def train(self) -> str | None:
        """Train to the last epoch; return what ended it before, if not the settings did."""
        card, position = self.card, self.position
        with closing(Board(self.config["run"], card)) if self.rank == 0 else nullcontext() as board:
            if board and not position.history:
                for block in islice(self.validation.blocks(), 1):  # of few images this rank may have none
                    board.show_images(block.image_BHW)
            while position.epoch <= card.training.num_epochs and not learning.no_longer_improves(
                position.history, card.training
            ):
                learning.set_learning_rate(self.steps, card.training, position.epoch)
                seed = share.seed_of(card.training.seed, position.epoch, self.rank)
                if position.step == 0:
                    torch.manual_seed(seed)
                record, fault = self._train_epoch(seed)
                if fault:
                    return fault
                true_B, predicted_B = self._validate(record)
                if not math.isfinite(record["validation_loss"]):
                    return (
                        f"training diverged: the validation loss after epoch {position.epoch} is not a finite number."
                    )
                position.history.append(record)
                position.step, position.loss_sum, position.seconds = 0, 0.0, 0.0
                if board:
                    board.add(record, true_B, predicted_B)
                    lines = "".join(json.dumps(line) + "\n" for line in position.history)
                    storage.write(storage.join(self.config["run"], "metrics.jsonl"), lines)
                self._checkpoint(record)
        return None

    def _hold(self, name: str, room: int) -> share.Resident | share.Streamed:
        parts, used = self.config["shares"][name]
        mine = share.parts_of(parts, used, rank=self.rank, world_size=self.world_size)
        return share.hold(mine, self.card.target, self.device, num_pixels=self.card.num_pixels, room=room)

    def _train_epoch(self, seed: int) -> tuple[dict[str, Any], str | None]:
        """Train to the end of the epoch in progress; return its record, and what ended it before."""
        position, num_images = self.position, self.card.num_training_images
        before, started = position.seconds, time.perf_counter()
        waited = 0.0

        def timed(batches: Iterator[learning.Batch]) -> Iterator[learning.Batch]:
            nonlocal waited
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                waited += time.perf_counter() - began
                if batch is None:
                    return
                yield batch

        # The sum of all ranks stands in the checkpoint, and the first goes on with it.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        total += position.loss_sum if self.rank == 0 else 0.0
        batches = timed(self.share.batches(self.epoch, seed, position.step))
        for step_loss in learning.train_epoch(self.take_step, batches):
            total += step_loss
            position.step += 1
            if position.step % _STEPS_BETWEEN_LOOKS == 0 and position.step < self.epoch.num_steps:
                diverged, due = self._look(total)
                if diverged:
                    break
                if due:
                    position.loss_sum = float(self._sum_over_ranks(total))
                    position.seconds = before + time.perf_counter() - started
                    # Of two checkpoints Ray holds one without a loss for the better, and cannot read a NaN again.
                    self._checkpoint({"validation_loss": sys.float_info.max})
        loss = float(self._sum_over_ranks(total)) / num_images
        spent = time.perf_counter() - started
        record = {
            "epoch": position.epoch,
            "train_loss": loss,
            "learning_rate": learning.learning_rate(self.card.training, position.epoch),
            "num_workers": self.world_size,
            "num_threads": torch.get_num_threads(),
            "share": "resident" if isinstance(self.share, share.Resident) else "streamed",
            "waiting": waited / spent,  # for data
            "images_per_second": num_images / (before + spent),
        }
        if math.isfinite(loss):
            return record, None
        return record, (
            f"training diverged: the loss in epoch {position.epoch} is not a finite number by step {position.step} "
            f"of {self.epoch.num_steps}; a smaller training.learning_rate than {record['learning_rate']:g} may help."
        )

    def _validate(self, record: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Add to an epoch's record what the validation set says; return truth and prediction of this rank's part."""
        started = time.perf_counter()
        _take_buffers_of_first(self.network)
        true_B, predicted_B = learning.validate(self.network, self.validation.blocks())
        of_rank = torch.as_tensor(Sums.of(true_B.numpy(), predicted_B.numpy()).values, device=self.device)
        sums = Sums(self._sum_over_ranks(of_rank).cpu().numpy())
        trained = self.card.num_training_images / record["images_per_second"]
        clock = self.config["clock"]
        record |= {
            "validation_loss": learning.loss_of(sums, self.network, self.card.training.loss),
            "validation_rmse": sums.rmse,
            "validation_gradient": sums.gradient,
            "validation_bias": sums.bias,
            "seconds": trained + time.perf_counter() - started,
            "elapsed": clock["before"] + time.time() - clock["started"],
        }
        return true_B, predicted_B

    def _look(self, total: torch.Tensor) -> tuple[bool, bool]:
        """Return whether the loss is no number any more, and whether a checkpoint is due, as all ranks see it."""
        now = time.monotonic()
        first = self.rank == 0  # whose clock counts
        seen = [
            float(not math.isfinite(total)),
            float(first and now - self.checkpointed >= self.config["seconds_between_checkpoints"]),
            float(first and now - self.asked >= _SECONDS_BETWEEN_QUESTIONS),
        ]
        seen_by_all = self._sum_over_ranks(torch.tensor(seen, dtype=torch.float64, device=self.device))
        diverged, due, asks = (value > 0 for value in seen_by_all.tolist())
        if asks:
            self.asked = now
            # A node is about to go: what it has learnt must not go with it.
            warned, self.warned = self.warned, ray.train.get_preemption_info() is not None
            due = due or (self.warned and not warned)
        return diverged, due

    def _checkpoint(self, record: dict[str, Any]) -> None:
        """Report an epoch, or that one is in progress; the files are carried away in the background."""
        self.checkpointed = time.monotonic()
        files = None
        if self.rank == 0 or self.position.step:
            folder = tempfile.mkdtemp()  # which Ray removes
            if self.rank == 0:
                checkpoint.save(folder, self.network, self.steps, self.position)
            if self.position.step:
                checkpoint.save_random_state(folder, self.rank)
            files = ray.train.Checkpoint.from_directory(folder)
        ray.train.report(record, checkpoint=files, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)

    def _sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all workers."""
        if self.world_size == 1:
            return values
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total


def _take_buffers_of_first(network: models.CNN) -> None:
    """Give all workers the batch-normalisation statistics of the first, which are those that are saved."""
    if torch.distributed.is_initialized():
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)
