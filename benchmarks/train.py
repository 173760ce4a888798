"""Training, side by side: a plain torch loop, the same over a DataLoader on the same Parquet, and raylens.

One machine, the same network, batch size, optimiser and threads, and each contestant in a process of its own; they take
turns. All train for the same number of epochs, of which the first is left out. S3 is a SeaweedFS on this machine, whose
cores it shares.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scale import alone
from shards import s3_server
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from raylens import learning, models, recipes, shards, storage
from raylens.dataset import Dataset

UNSCALED = models.Scaling(offset=380.0, scale=170.0)
NUM_CPUS = len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--networks", nargs="+", default=["n-cnn"])
    parser.add_argument("--epochs", type=int, default=4, help="the first of which is not counted")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    facts = []
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as bucket:
        data = {root: alone(simulate, root, arguments.images) for root in (folder, bucket)}
        for network in arguments.networks:
            for batch_size in arguments.batch_sizes:
                task = (network, batch_size)
                loops = {
                    "plain loop": (in_memory, False),
                    "plain loop, DataLoader": (with_loader, False),
                    "plain loop, laid out as raylens": (in_memory, True),
                }
                runs = {"raylens": (folder, 1), "raylens, S3": (bucket, 1), "raylens, two workers": (folder, 2)}
                told: dict[str, list[dict[str, float]]] = defaultdict(list)
                for repeat in range(arguments.repeats):
                    for name, (loop, laid_out) in loops.items():
                        told[name].append(alone(run_loop, loop, data[folder], *task, arguments.epochs, laid_out))
                    for name, (root, num_workers) in runs.items():
                        run = storage.join(root, f"{network}-{batch_size}-{num_workers}-{repeat}")
                        told[name].append(alone(run_raylens, data[root], run, *task, num_workers, arguments.epochs))
                plain = median(turn["images_per_second"] for turn in told["plain loop"])
                for name, turns in told.items():
                    row = {key: median(turn[key] for turn in turns) for key in turns[0]}
                    facts.append({"network": network, "batch_size": batch_size, "name": name, **row})
                    print(
                        f"{network:10} batch {batch_size:4}  {name:32} {row['images_per_second']:7,.0f} images/s  "
                        f"{row['images_per_second'] / plain:5.2f} of the plain loop  waiting {row['waiting']:6.2%}  "
                        f"first batch after {row['first']:5.1f} s",
                        flush=True,
                    )
        for num_threads in (1, NUM_CPUS):
            rate = at_once(data[folder], num_threads)
            print(f"{NUM_CPUS} plain loops at once, threads of each: {num_threads}  {rate:7,.0f} images/s together")
            facts.append({"name": "at once", "num_threads": num_threads, "images_per_second": rate})
    print(json.dumps({"num_cpus": NUM_CPUS, "images": arguments.images, "rows": facts}))


def simulate(root: str, num_images: int) -> str:
    from raylens import generate

    return generate.simulate(recipes.paper_fixed().simulation, root, recipe="train", num_images=num_images).dataset


def run_loop(
    loop: Any,
    uri: str,
    network: str,
    batch_size: int,
    epochs: int,
    laid_out: bool = False,
    num_threads: int = NUM_CPUS,
    most_steps: int = sys.maxsize,
) -> dict[str, float]:
    """Return the rate of a plain torch loop over what gives batches for ever; laid out: in raylens's memory layout."""
    torch.set_num_threads(num_threads)
    began = time.perf_counter()
    settings = recipes.paper_fixed().n_cnn if network == "n-cnn" else recipes.paper_fixed().alpha_cnn
    cnn = models.CNN(network, settings.model, num_pixels=60, target=UNSCALED, num_subhalos=UNSCALED)  # type: ignore[arg-type]
    if laid_out:
        learning.on_device(cnn, torch.device("cpu"))
    optimizer = learning.optimizer(cnn, settings.training)
    cnn.train()
    data = Dataset.open(uri)
    batches = loop(data, models.TARGETS[network], batch_size)  # type: ignore[index]
    num_steps = min(-(-data.num_images // batch_size), most_steps)
    first, rates, waiting = 0.0, [], []
    for _ in range(epochs):
        started, waited, num_images = time.perf_counter(), 0.0, 0
        for _ in range(num_steps):
            asked = time.perf_counter()
            image_BHW, num_subhalos_B, target_B = next(batches)
            now = time.perf_counter()
            waited += now - asked
            first = first or now - began
            loss = (cnn(image_BHW, num_subhalos_B) - cnn.scaled(target_B)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            num_images += len(image_BHW)
        spent = time.perf_counter() - started
        rates.append(num_images / spent)
        waiting.append(waited / spent)
    return {"images_per_second": median(rates[1:]), "waiting": median(waiting[1:]), "first": first}


def at_once(uri: str, num_threads: int) -> float:
    """Return the rate of as many plain loops as there are CPUs together: what threads that compete cost."""
    with ProcessPoolExecutor(NUM_CPUS, mp_context=multiprocessing.get_context("spawn")) as pool:
        task = (in_memory, uri, "n-cnn", 16, 2, False, num_threads, 64)
        running = [pool.submit(run_loop, *task) for _ in range(NUM_CPUS)]
        return sum(one.result()["images_per_second"] for one in running)


def in_memory(data: Dataset, target: str, batch_size: int) -> Iterator[list[torch.Tensor]]:
    """Shuffled batches of tensors that hold all images."""
    tables = [shards.read(uri, ["image", *{"num_subhalos", target}]) for uri, _ in data.parts]
    images = torch.from_numpy(np.concatenate([shards.images(table) for table in tables]))
    columns = [
        torch.from_numpy(np.concatenate([table[name].to_numpy() for table in tables]).astype(np.float32))
        for name in ("num_subhalos", target)
    ]
    while True:
        for rows in torch.randperm(len(images)).split(batch_size):
            yield [images[rows], *(column[rows] for column in columns)]


class Rows(TorchDataset):
    """The rows of a dataset one by one, each shard read as a whole when a row of it is first asked for."""

    def __init__(self, data: Dataset, target: str) -> None:
        self.parts, self.target, self.size = data.parts, target, data.plan.shard_size
        self.num_images, self.read = data.num_images, {}

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.float32, np.float32]:
        shard, position = divmod(row, self.size)
        if shard not in self.read:
            table = shards.read(self.parts[shard][0], ["image", *{"num_subhalos", self.target}])
            columns = [table[name].to_numpy().astype(np.float32) for name in ("num_subhalos", self.target)]
            self.read[shard] = (shards.images(table), *columns)
        images, num_subhalos, target = self.read[shard]
        return images[position], num_subhalos[position], target[position]


def with_loader(data: Dataset, target: str, batch_size: int) -> Iterator[list[torch.Tensor]]:
    """Shuffled batches from torch's DataLoader, which reads in this process: another would take a core away."""
    return for_ever(DataLoader(Rows(data, target), batch_size=batch_size, shuffle=True))


def for_ever(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    while True:
        yield from loader


def run_raylens(uri: str, run: str, network: str, batch_size: int, num_workers: int, epochs: int) -> dict[str, float]:
    """Return what the later epochs of a run tell; with more workers each has its part of a batch."""
    from raylens import train

    experiment = recipes.paper_fixed()
    settings = experiment.n_cnn if network == "n-cnn" else experiment.alpha_cnn
    settings = settings.override({"training.num_epochs": epochs, "training.batch_size": batch_size})
    records: list[dict[str, Any]] = []
    train.train(
        network,  # type: ignore[arg-type]
        settings,
        run,
        data=Dataset.open(uri),
        recipe="train",
        num_workers=num_workers,
        progress=records.append,
    )
    later = records[1:]
    return {
        "images_per_second": median(record["images_per_second"] for record in later),
        "waiting": median(record["waiting"] for record in later),
        "first": records[0]["elapsed"] - records[0]["seconds"],
    }


if __name__ == "__main__":
    main()
