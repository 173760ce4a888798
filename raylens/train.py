"""Many workers train one network, with Ray Train: epochs, validation, checkpoints, metrics.

The dataset comes through Ray Data. Each worker reads its share once and keeps it in memory (on its
GPU, if it has one), and shuffles it anew in each epoch. What an epoch does depends on the seed,
its number and the worker's rank alone, so that a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig

from raylens import __version__, cluster, dataset, learning, models, shards, storage
from raylens.config import Network
from raylens.dataset import Dataset
from raylens.metrics import Sums

_NUM_READ_AT_ONCE = 4096  # images

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
    num_workers: int = 1,
    resume: bool = False,
    progress: Progress = lambda record: None,
) -> Trained:
    """Train a network on a dataset and keep the epoch with the lowest validation loss.

    Raises
    ------
    ValueError
        If the validation set is of another simulation, if the run stands and is not to be resumed,
        or if the cluster is too small.
    """
    started = time.time()
    run = storage.absolute(run)
    if validation:
        _require_same_simulation(data, validation)
    if not resume and storage.names(run):
        raise ValueError(f"{run} stands already; go on with --resume, or choose another --to.")
    if network.training.batch_size % num_workers:
        raise ValueError(
            f"training.batch_size {network.training.batch_size} is not shared evenly by {num_workers} workers."
        )
    held_out = np.zeros(data.num_images, bool)
    if validation is None:
        held_out = _held_out(data.num_images, network.training.seed)
    card = _card(name, network, held_out, data, validation, recipe, num_workers)
    storage.check_writable(run)
    use_gpu = _require_room(cluster.connect(), card)

    before = _history(run)
    # The time of earlier calls, and when this one began: an epoch's record says how long the run has taken by then.
    clock = {"before": before[-1]["elapsed"] if before else 0.0, "started": started}
    with _interruptible(), _following(storage.join(run, "metrics.jsonl"), progress):
        trainer = _trainer(card, run, _datasets(data, validation, held_out), use_gpu, clock)
        result = trainer.fit()
    return _keep_best(result, card, run, use_gpu, clock, num_before=len(before))


def _require_same_simulation(data: Dataset, validation: Dataset) -> None:
    """Refuse to validate on images that were not drawn as those trained on: another task would choose the epoch."""
    apart = {"seed", "engine", "output"}  # with others of these, images are drawn alike
    there, here = (one.plan.simulation.model_dump(mode="json", exclude=apart) for one in (validation, data))
    if there != here:
        raise ValueError(
            f"{validation.uri} is of another simulation than {data.uri}: {shards.difference(there, here)}. "
            "Validate on another split of the same."
        )


def _require_room(resources: cluster.Resources, card: models.Card) -> bool:
    """Refuse a cluster that is too small; return whether each worker has a GPU."""
    if resources.num_cpus < card.num_workers + 1:
        raise ValueError(
            f"{card.num_workers} workers need {card.num_workers + 1} CPUs, one of them to read data; "
            f"the cluster has {resources.num_cpus}."
        )
    # A share arrives in parts, which are joined and put in order: three times its size for a moment.
    needed = 3 * 4 * card.num_pixels**2 * card.num_training_images
    if needed > resources.memory:
        raise ValueError(
            f"{card.num_training_images:,} images need {needed / 2**30:.0f} GiB of memory to train on; the cluster has "
            f"{resources.memory / 2**30:.0f} GiB. Train on fewer images, or on more nodes."
        )
    return resources.num_gpus >= card.num_workers


def _trainer(
    card: models.Card, run: str, datasets: dict[str, Any], use_gpu: bool, clock: dict[str, float]
) -> ray.train.torch.TorchTrainer:
    file_system, path = storage.arrow_file_system(run)
    return ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"card": card.as_dict(), "run": run, "clock": clock},
        datasets=datasets,
        # What is measured on is not split, or rows would be lost.
        dataset_config=DataConfig(datasets_to_split=["train"]),
        scaling_config=ScalingConfig(num_workers=card.num_workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=file_system,
            # The best, and beside it always the newest.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="validation_loss", checkpoint_score_order="min"
            ),
            failure_config=FailureConfig(max_failures=3),
        ),
    )


def _keep_best(
    result: ray.train.Result, card: models.Card, run: str, use_gpu: bool, clock: dict[str, float], *, num_before: int
) -> Trained:
    """Make the weights of the best epoch those of the run."""
    history = _history(run)
    assert result.best_checkpoints is not None
    best, metrics = min(result.best_checkpoints, key=lambda pair: pair[1]["validation_loss"])
    kept = next(record for record in history if record["epoch"] == metrics["epoch"])
    with best.as_directory() as folder, open(os.path.join(folder, "model.safetensors"), "rb") as file:
        weights = file.read()
    cpu_seconds = [record["seconds"] * record["num_threads"] * card.num_workers for record in history]
    gpu_seconds = [record["seconds"] * use_gpu * card.num_workers for record in history]
    seconds = time.time() - clock["started"]
    card = card.override(
        {
            "epoch": kept["epoch"],
            "metrics": kept,
            "seconds": clock["before"] + seconds,
            "cpu_seconds": sum(cpu_seconds),
            "gpu_seconds": sum(gpu_seconds),
            "num_threads": kept["num_threads"],
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


def _held_out(num_images: int, seed: int) -> np.ndarray:
    """Return which rows validate where no validation set is given: a seeded tenth."""
    if num_images < 10:
        raise ValueError(f"a tenth of {num_images} images is none to validate on; simulate more or pass --validation.")
    held_out = np.zeros(num_images, bool)
    held_out[np.random.default_rng(seed).choice(num_images, num_images // 10, replace=False)] = True
    return held_out


def _card(
    name: models.NetworkName,
    network: Network,
    held_out: np.ndarray,
    data: Dataset,
    validation: Dataset | None,
    recipe: str,
    num_workers: int,
) -> models.Card:
    """Return what is known of a network before it is trained; scaling and baselines come from training labels alone."""
    labels = data.read(["index", "num_subhalos", "alpha"])
    used = ~held_out[labels["index"]]
    target = labels[models.TARGETS[name]][used].astype(np.float64)
    num_subhalos = labels["num_subhalos"][used].astype(np.float64)
    card = models.Card(
        network=name,
        target=models.TARGETS[name],
        num_pixels=data.num_pixels,
        num_parameters=0,
        model=network.model,
        training=network.training,
        target_scaling=_scaling(target),
        num_subhalos_scaling=_scaling(num_subhalos),
        baselines=_baselines(target, num_subhalos),
        recipe=recipe,
        dataset=data.uri,
        dataset_digest=data.plan.digest,
        validation_dataset=validation.uri if validation else None,
        num_training_images=int(used.sum()),
        num_validation_images=validation.num_images if validation else int((~used).sum()),
        num_workers=num_workers,
        num_threads=0,
        device="",
        epoch=0,
        metrics={},
        seconds=0.0,
        cpu_seconds=0.0,
        gpu_seconds=0.0,
        versions={**dataset.versions(), "torch": torch.__version__, "ray": ray.__version__, "raylens": __version__},
    )
    return card.override({"num_parameters": models.num_parameters(models.build(card))})


def _scaling(values: np.ndarray) -> models.Scaling:
    # A label that does not vary (a held slope) is left where it is.
    return models.Scaling(mean=float(values.mean()), sd=float(values.std()) or 1.0)


def _baselines(target: np.ndarray, num_subhalos: np.ndarray) -> models.Baselines:
    """Fit the mean of the target as a function of N by its means in bins of equal numbers of images."""
    order = np.argsort(num_subhalos, kind="stable")
    num_bins = int(np.clip(len(order) // 50, 1, 64))  # fifty images fix a mean to a seventh of the spread
    bins = np.array_split(order, num_bins)
    means = {float(num_subhalos[rows].mean()): float(target[rows].mean()) for rows in bins}
    return models.Baselines(
        constant=float(target.mean()), num_subhalos=list(means), target_of_num_subhalos=list(means.values())
    )


def _datasets(data: Dataset, validation: Dataset | None, held_out: np.ndarray) -> dict[str, Any]:
    if validation is not None:
        return {"train": _rows(data, ~held_out), "validation": _rows(validation, np.ones(validation.num_images, bool))}
    return {"train": _rows(data, ~held_out), "validation": _rows(data, held_out)}


def _rows(data: Dataset, kept: np.ndarray) -> ray.data.Dataset:
    """Return some rows of a dataset; a task reads a shard itself."""
    parts = data.parts

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        uri, num_rows = parts[int(batch["id"][0])]
        table = shards.read(uri, ["index", "image", "num_subhalos", "alpha"])[:num_rows]
        return table.filter(pa.array(kept[table["index"].to_numpy()]))

    return ray.data.range(len(parts), override_num_blocks=len(parts)).map_batches(read, batch_size=1)


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
def _following(place: str, progress: Progress) -> Iterator[None]:
    """Pass each line that the workers add to metrics.jsonl on while the body runs."""
    stop = threading.Event()
    num_seen = len(storage.read(place).splitlines()) if storage.exists(place) else 0

    def follow() -> None:
        nonlocal num_seen
        last = False
        while not last:
            last = stop.wait(1.0)
            lines = storage.read(place).splitlines() if storage.exists(place) else []
            for line in lines[num_seen:]:
                progress(json.loads(line))
            num_seen = max(num_seen, len(lines))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _train_worker(config: dict[str, Any]) -> None:
    """Train on this worker's share, in step with the others; runs in each of them."""
    card, clock = models.Card.parse(config["card"]), config["clock"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    share = _load(ray.train.get_dataset_shard("train"), card.target, device)
    whole = _load(ray.train.get_dataset_shard("validation"), card.target, device)
    validation = whole.take(slice(rank, None, world_size))
    # Data holds no core any more, so the workers of this node share them all.
    num_threads = max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size())
    torch.set_num_threads(num_threads)

    seed = card.training.seed
    torch.manual_seed(seed)
    network = models.build(card).to(device)
    steps = learning.optimizer(network, card.training)
    history = _restore(network, steps)
    model = ray.train.torch.prepare_model(network)
    with tempfile.TemporaryDirectory() as scratch, _tensorboard(config["run"], scratch, rank) as log:
        for epoch in range(len(history) + 1, card.training.num_epochs + 1):
            started = time.perf_counter()
            torch.manual_seed(_seed_of_epoch(seed, epoch, rank))
            shuffle = torch.Generator().manual_seed(_seed_of_epoch(seed, epoch, rank))
            batch_size = card.training.batch_size // world_size
            trained = learning.train_epoch(model, network, [share], steps, batch_size=batch_size, shuffle=shuffle)
            squared_error_sum, num_trained = _sum_over_ranks(trained, device)
            seconds = time.perf_counter() - started
            _take_buffers_of_first(network)
            sums = Sums(_sum_over_ranks(learning.validate(network, [validation]).values, device))
            record = {
                "epoch": epoch,
                "train_loss": squared_error_sum / num_trained,
                "validation_loss": (sums.rmse / network.target.sd) ** 2,
                "validation_rmse": sums.rmse,
                "validation_gradient": sums.gradient,
                "validation_bias": sums.bias,
                "num_threads": num_threads,
                "images_per_second": num_trained / seconds,
                "seconds": time.perf_counter() - started,
                "elapsed": clock["before"] + time.time() - clock["started"],
            }
            history.append(record)
            if rank == 0:
                log(record)
                lines = "".join(json.dumps(line) + "\n" for line in history)
                storage.write(storage.join(config["run"], "metrics.jsonl"), lines)
                with tempfile.TemporaryDirectory() as folder:
                    _save(folder, network, steps, history)
                    ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))
            else:
                ray.train.report(record)


def _load(shard: ray.data.DataIterator, target: str, device: torch.device) -> learning.Block:
    """Return a share of a dataset as tensors on the device, in the order of its rows."""
    indices, parts = [], []
    tables = shard.iter_batches(batch_format="pyarrow", batch_size=_NUM_READ_AT_ONCE)
    for images, others in shards.batches(iter(tables)):
        indices.append(others["index"])
        columns = (images, others["num_subhalos"], others[target])
        parts.append([torch.as_tensor(np.array(column, np.float32), device=device) for column in columns])
    share = learning.Block(*(torch.cat(column) for column in zip(*parts, strict=True)))
    # Blocks arrive in any order, and what an epoch shuffles must not depend on it.
    return share.take(torch.as_tensor(np.argsort(np.concatenate(indices)), device=device))


def _seed_of_epoch(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _sum_over_ranks(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Return the sum of an array over all workers."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return values
    # In double precision where the device has it: the sums of squares are large.
    total = torch.as_tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(total)
    return total.cpu().numpy()


def _take_buffers_of_first(network: models.CNN) -> None:
    """Give all workers the batch-normalisation statistics of the first, which are those that are saved."""
    if torch.distributed.is_initialized():
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def _save(folder: str, network: models.CNN, steps: torch.optim.Optimizer, history: list[dict[str, Any]]) -> None:
    """Write a checkpoint: weights and the optimiser's moments as tensors, the rest as JSON."""
    moments = {
        f"{parameter}.{name}": value
        for parameter, state in steps.state_dict()["state"].items()
        for name, value in state.items()
    }
    safetensors.torch.save_file(network.state_dict(), os.path.join(folder, "model.safetensors"))
    safetensors.torch.save_file(moments, os.path.join(folder, "optimizer.safetensors"))
    with open(os.path.join(folder, "history.json"), "w") as file:
        json.dump(history, file)


def _restore(network: models.CNN, steps: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Load the checkpoint from which this run goes on, if there is one; return the epochs behind it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as folder:
        network.load_state_dict(safetensors.torch.load_file(os.path.join(folder, "model.safetensors")))
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in safetensors.torch.load_file(os.path.join(folder, "optimizer.safetensors")).items():
            parameter, name = key.split(".")
            moments.setdefault(int(parameter), {})[name] = value
        steps.load_state_dict({"state": moments, "param_groups": steps.state_dict()["param_groups"]})
        with open(os.path.join(folder, "history.json")) as file:
            return json.load(file)


@contextmanager
def _tensorboard(run: str, scratch: str, rank: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what writes an epoch's record to TensorBoard, readable in the run while it goes on."""
    if rank != 0:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(scratch) as writer:

        def log(record: dict[str, Any]) -> None:
            for name, value in record.items():
                if name != "epoch" and value is not None:
                    writer.add_scalar(name, value, record["epoch"])
            writer.flush()
            # Objects cannot be appended to: the file is put there anew.
            storage.upload(scratch, storage.join(run, "tensorboard"))

        yield log
