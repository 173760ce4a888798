"""Training on one GPU, without Ray: images/s of both networks at several batch sizes, and the time of the paper's.

Timed is what a worker of `raylens train` does: `learning.train_epoch` over shuffled batches of images that are kept on
the device, and a look at the loss every 64 steps, of which the first 64 (captures, compilation) are not counted. Of the
variants "graph, channels last" is what raylens does by default, and "graph, bfloat16, channels last" what it does with
`training.precision=bfloat16`; the others show what each part is worth.

Needs torch, numpy, scipy, pydantic, safetensors, fsspec and pyarrow, and the folder `raylens` on PYTHONPATH; no Ray:

    PYTHONPATH=. python benchmarks/train_gpu.py --compile                # makes its images
    PYTHONPATH=. python benchmarks/train_gpu.py --data data/part-*.parquet  # reads shards of a dataset

The images it makes are noisy rings by a formula, with labels of no meaning: the rate does not depend on what is seen.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from raylens import learning, models, share
from raylens.config import Experiment, Precision
from raylens.learning import Batch, Block

NETWORKS = {"n-cnn": Experiment().n_cnn, "alpha-cnn": Experiment().alpha_cnn}
PAPERS_IMAGES = 100 * 100_000  # epochs times images
STEPS_BETWEEN_LOOKS = 64


class Variant(NamedTuple):
    graph: bool = False
    precision: Precision = "float32"
    channels_last: bool = False
    deterministic: bool = True  # cuDNN's kernels, as in raylens, where a resumed run is the one that was interrupted
    compiled: bool = False


VARIANTS = {
    "eager": Variant(),
    "eager, bfloat16": Variant(precision="bfloat16"),
    "graph": Variant(graph=True),
    "graph, not deterministic": Variant(graph=True, deterministic=False),
    "graph, channels last": Variant(graph=True, channels_last=True),
    "graph, bfloat16": Variant(graph=True, precision="bfloat16"),
    "graph, bfloat16, channels last": Variant(graph=True, precision="bfloat16", channels_last=True),
    "compile": Variant(compiled=True),
    "graph, channels last, compile": Variant(graph=True, channels_last=True, compiled=True),
    "graph, bfloat16, channels last, compile": Variant(True, "bfloat16", True, True, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="shards of a dataset, instead of images made here")
    parser.add_argument("--images", type=int, default=100_000, help="made here")
    parser.add_argument("--pixels", type=int, default=60, help="on each side of an image made here")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--compile", action="store_true", help="also the variants under torch.compile")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each repeat, at least")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "num_threads": torch.get_num_threads(),
    }
    print("  ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    parts: list[Any] = [File(path) for path in options.data or []] or [Rings(options.images, options.pixels)]
    rows = []
    for network in options.networks:
        images = share.Resident(share.read(parts, models.TARGETS[network], device))
        for batch_size in options.batch_sizes:
            for name, variant in VARIANTS.items():
                if (variant.graph and not on_gpu) or (variant.compiled and not options.compile):
                    continue
                row = measure(network, images, batch_size, variant, options.seconds, options.repeats)
                rows.append({"network": network, "batch_size": batch_size, "variant": name, **row})
                print(
                    f"{network:9}  batch {batch_size:4}  {name:39}  {row['images_per_second']:9,.0f} images/s  "
                    f"{row['milliseconds']:8.3f} ms a step  {row['papers_seconds']:9,.0f} s for 100 x 100,000 images  "
                    f"{row['megabytes']:7,.0f} MB  warm after {row['seconds_before']:.1f} s",
                    flush=True,
                )
        del images
    print(json.dumps(facts | {"images": sum(len(part.rows) for part in parts), "rows": rows}))


def measure(
    name: models.NetworkName, images: share.Resident, batch_size: int, variant: Variant, seconds: float, repeats: int
) -> dict[str, float]:
    """Return the rate of a training, the median of some repeats, and what it took to be warm."""
    device = images.block.target_B.device  # type: ignore[union-attr]
    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cudnn.deterministic = variant.deterministic
    torch.manual_seed(0)
    training = NETWORKS[name].training.override({"batch_size": batch_size, "precision": variant.precision})
    cnn = network(name, images).to(device)
    if variant.channels_last:
        cnn.to(memory_format=torch.channels_last)
    if variant.compiled:
        cnn.compile(dynamic=False)
    steps = learning.optimizer(cnn, training)
    step = learning.Step(cnn, cnn, steps, precision=variant.precision, graph=variant.graph)
    batches = endless(images, batch_size)
    train(step, islice(batches, STEPS_BETWEEN_LOOKS))
    seconds_before = time.perf_counter() - began

    rates, times = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        num_images = num_steps = 0
        while time.perf_counter() - started < seconds:
            num_images += train(step, islice(batches, STEPS_BETWEEN_LOOKS))
            num_steps += STEPS_BETWEEN_LOOKS
        spent = time.perf_counter() - started  # the last look has waited for the device
        rates.append(num_images / spent)
        times.append(1e3 * spent / num_steps)
    megabytes = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0.0
    del step, steps, cnn
    gc.collect()  # graphs and what they capture refer to each other
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "images_per_second": median(rates),
        "milliseconds": median(times),
        "papers_seconds": PAPERS_IMAGES / median(rates),
        "megabytes": megabytes,
        "seconds_before": seconds_before,
    }


def network(name: models.NetworkName, images: share.Resident) -> models.CNN:
    block = images.block
    assert block is not None
    target, num_subhalos = (
        models.Scaling(offset=float(labels_B.mean()), scale=float(labels_B.std()))
        for labels_B in (block.target_B, block.num_subhalos_B)
    )
    return models.CNN(
        name,
        NETWORKS[name].model,
        num_pixels=block.image_BHW.shape[-1],
        target=target,
        num_subhalos=num_subhalos,
    )


def endless(images: share.Resident, batch_size: int) -> Iterator[Batch]:
    """The batches of one epoch after another."""
    num_images = len(images.block.target_B)  # type: ignore[union-attr]
    for seed in count():
        yield from images.batches(share.Epoch(num_images, batch_size, rank=0, world_size=1), seed)


def train(step: learning.Step, batches: Iterator[Batch]) -> int:
    """Train, look at the loss, which waits for the device, and return the number of images."""
    total, num_images = None, 0

    def counted() -> Iterator[Batch]:
        nonlocal num_images
        for batch in batches:
            num_images += len(batch.rows.target_B)
            yield batch

    for step_loss in learning.train_epoch(step, counted()):
        total = step_loss.double() if total is None else total.add_(step_loss)
    loss = float(total) / num_images
    assert math.isfinite(loss), f"the loss is {loss}: what follows would be the rate of nothing"
    return num_images


class File(share.Part):
    """All rows of a shard."""

    def __init__(self, path: str) -> None:
        super().__init__(path, np.arange(pq.read_metadata(path).num_rows))


@dataclass(frozen=True)
class Rings:
    """Images made here: a ring of a Gaussian profile and of some radius and width, and noise."""

    num_images: int
    num_pixels: int

    @property
    def rows(self) -> range:
        return range(self.num_images)

    def read(self, target: str) -> Block:
        chance = torch.Generator().manual_seed(0)
        radius_B, width_B, num_subhalos_B, target_B = torch.rand(4, self.num_images, generator=chance)
        axis = torch.linspace(-1, 1, self.num_pixels)
        distance_HW = torch.hypot(axis[:, None], axis[None, :])
        # In place, as there are gigabytes of them.
        image_BHW = torch.randn(self.num_images, self.num_pixels, self.num_pixels, generator=chance).mul_(0.03)
        for image_HW, radius, width in zip(image_BHW, 0.3 + 0.4 * radius_B, 0.1 + 0.1 * width_B, strict=True):
            image_HW += torch.exp(-(((distance_HW - radius) / width) ** 2) / 2)
        return Block(image_BHW, 24 + 1600 * num_subhalos_B, target_B)


if __name__ == "__main__":
    main()
