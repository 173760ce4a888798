"""Many blocks of lenses, into Parquet, with Ray Data: a task makes a few shards.

A task finds a shard sound or makes it, writes it itself, and returns only what the manifest is
to know; no image passes through the driver or the object store. What a task makes is a function
of the plan and the shard's number, so retries and reruns cannot change a byte.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from raylens import cluster, dataset, illustrate, storage
from raylens.config import Simulation
from raylens.physics.render import processor
from raylens.simulate import require_drawable, simulate_block

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 128  # images simulated at once: few enough for the processor's cache

Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Simulated:
    """What a run of `simulate` made, and what that cost."""

    dataset: str  # URI
    num_images: int
    num_shards: int
    num_made: int  # shards
    num_skipped: int  # shards that stood and were sound
    seconds: float
    cpu_seconds: float
    images_per_second: float  # of those made


def simulate(
    simulation: Simulation,
    root: str,
    *,
    recipe: str,
    split: str = "train",
    num_images: int,
    shard_size: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Simulated:
    """Make the dataset of a split below a root, or what is missing of it.

    Raises
    ------
    ValueError
        If the simulation cannot be drawn, or a dataset of another shard size stands.
    StorageError
        If the root cannot be written.
    """
    started = time.perf_counter()
    require_drawable(simulation)
    storage.check_writable(root)
    uri = dataset.location(root, recipe=recipe, split=split, simulation=simulation)
    # One row, here: what cannot be simulated fails before anything is written, and the kernel is
    # compiled and cached for the workers of this machine.
    simulate_block(simulation, [0], split)
    plan = dataset.begin(
        uri, recipe=recipe, split=split, simulation=simulation, num_images=num_images, shard_size=shard_size
    )
    resources = cluster.connect()
    manifest = dataset.read_manifest(uri)
    known = ray.put(manifest.shards if manifest else None)

    def stand_or_make(row: dict[str, Any]) -> dict[str, Any]:
        return _stand_or_make(uri, plan, int(row["id"]), ray.get(known))

    done: dict[int, dict[str, Any]] = {}
    num_done = 0
    num_tasks = math.ceil(plan.num_shards / _shards_per_task(plan.num_shards, resources.num_cpus))
    shards = ray.data.range(plan.num_shards, override_num_blocks=num_tasks).map(stand_or_make)
    for row in shards.iter_rows():
        done[row["shard"]] = row
        num_done += row["rows"]
        progress(num_done, plan.num_images)
    rows = [done[shard] for shard in range(plan.num_shards)]
    made = [row for row in rows if row["made"]]
    if made or manifest is None:
        storage.write(storage.join(uri, "illustration.json"), illustrate.illustration(simulation))
    dataset.finish(
        uri,
        plan,
        [dataset.Shard(name=row["name"], rows=row["rows"], bytes=row["bytes"], sha256=row["sha256"]) for row in rows],
        sorted({row["processor"] for row in made}),
    )
    seconds = time.perf_counter() - started
    logger.info("dataset complete  images=%d shards=%d made=%d uri=%s", plan.num_images, len(rows), len(made), uri)
    return Simulated(
        dataset=uri,
        num_images=plan.num_images,
        num_shards=len(rows),
        num_made=len(made),
        num_skipped=len(rows) - len(made),
        seconds=seconds,
        cpu_seconds=sum(row["cpu_seconds"] for row in rows),
        images_per_second=sum(row["rows"] for row in made) / seconds,
    )


def _shards_per_task(num_shards: int, num_cpus: int) -> int:
    """Return how many shards a task makes: more, where there are plenty, since a core idles between two tasks."""
    return min(max(num_shards // (4 * num_cpus), 1), 4)


def _stand_or_make(uri: str, plan: dataset.Plan, shard: int, known: list[dataset.Shard] | None) -> dict[str, Any]:
    started = time.process_time()
    sound = dataset.sound_shard(uri, plan, shard, known[shard] if known else None)
    described = sound or dataset.write_shard(uri, shard, _simulate_rows(plan, plan.rows(shard)))
    return {
        "shard": shard,
        "made": sound is None,
        "processor": processor(),
        "cpu_seconds": time.process_time() - started,
        **described.as_dict(),
    }


def _simulate_rows(plan: dataset.Plan, rows: range) -> pa.Table:
    tables = []
    for first in range(rows.start, rows.stop, _BLOCK_SIZE):
        block = range(first, min(first + _BLOCK_SIZE, rows.stop))
        tables.append(dataset.to_table(simulate_block(plan.simulation, block, plan.split), plan.simulation, plan.split))
    return pa.concat_tables(tables).combine_chunks()
