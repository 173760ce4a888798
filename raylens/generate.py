"""Many blocks of lenses, into Parquet, with Ray Data: a task makes a few shards.

A task finds a shard sound or makes it, writes it itself, and returns only what the manifest and the
card are to know; no image passes through the object store, and through the driver only those of the
contact sheet's shard. What a task makes is a function of the plan and the shard's number, so retries
and reruns cannot change a byte.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from raylens import card, cluster, dataset, illustrate, shards, storage
from raylens.config import Simulation
from raylens.dataset import Entry, Found, Plan
from raylens.physics.render import processor
from raylens.simulate import require_drawable, simulate_block

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 128  # images simulated at once: few enough for the processor's cache
_NUM_CPUS_TO_COME = 64  # where an autoscaler has yet to start the first node: tasks for one CPU would keep few busy

Progress = Callable[[int, int, str], None]  # images done, images in all, how many shards


@dataclass(frozen=True)
class Simulated:
    """What a run of `simulate` made, and what that cost."""

    dataset: str  # URI
    num_images: int
    num_shards: int
    num_made: int  # shards
    num_skipped: int  # shards that stood and were sound
    seconds: float
    seconds_to_start: float  # of them, until Ray was ready
    seconds_to_finish: float  # of them, after the last shard
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
    progress: Progress = lambda done, total, detail: None,
) -> Simulated:
    """Make the dataset of a split below a root, or what is missing of it.

    Raises
    ------
    ValueError
        If the simulation cannot be drawn, another dataset or one of another shard size stands, or
        the cluster cannot see the root.
    StorageError
        If the root cannot be written.
    """
    started = time.perf_counter()
    require_drawable(simulation, split)
    storage.check_writable(root)
    uri = dataset.location(root, recipe=recipe, split=split, simulation=simulation)
    plan = dataset.plan_for(
        uri, recipe=recipe, split=split, simulation=simulation, num_images=num_images, shard_size=shard_size
    )
    # One row, here: what cannot be simulated fails before anything is written, and the kernel is
    # compiled and cached for the workers of this machine.
    simulate_block(simulation, [0], split)
    cluster.connect()
    cluster.require_shared(uri)
    dataset.begin(uri, plan)
    manifest = _standing_manifest(uri)
    ready = time.perf_counter()

    made_here = Made()
    rows = _stand_or_make(uri, plan, manifest)
    for task in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(task, pa.Table)
        for facts in task.to_pylist():
            made_here.add(facts)
        cluster.publish(
            uri,
            shards_planned=plan.num_shards,
            shards_done=len(made_here.entries),
            images_made=made_here.num_images_made,
            images_found=made_here.num_images - made_here.num_images_made,
        )
        progress(made_here.num_images, plan.num_images, f"{len(made_here.entries)} of {plan.num_shards} shards")
    last = time.perf_counter()
    entries = [made_here.entries[dataset.shard_name(number)] for number in range(plan.num_shards)]
    described = {"README.md", "contact-sheet.png", "illustration.json"} <= storage.names(uri)
    if manifest is None or entries != manifest.shards or not described:
        storage.write(storage.join(uri, "illustration.json"), illustrate.illustration(simulation))
        card.write(uri, plan, entries, made_here.statistics, made_here.processors)
    dataset.finish(uri, plan, entries, made_here.processors)
    storage.remove_unfinished(uri)
    ended = time.perf_counter()
    logger.info(
        "dataset complete  images=%d shards=%d made=%d uri=%s", plan.num_images, len(entries), made_here.num_made, uri
    )
    return Simulated(
        dataset=uri,
        num_images=plan.num_images,
        num_shards=len(entries),
        num_made=made_here.num_made,
        num_skipped=len(entries) - made_here.num_made,
        seconds=ended - started,
        seconds_to_start=ready - started,
        seconds_to_finish=ended - last,
        cpu_seconds=made_here.cpu_seconds,
        images_per_second=made_here.num_images_made / (ended - started),
    )


@dataclass(frozen=True)
class Estimate:
    """What a run of `simulate` would cost."""

    num_standing: int  # shards, sound or not
    bytes: int
    cpu_hours: float  # of cores like this machine's, for the shards that do not stand
    where: str


def estimate(uri: str, plan: Plan) -> Estimate:
    """Return what it would cost to make a dataset, or what is missing of it, from a few seconds of trial."""
    rows = range(min(plan.shard_size, plan.num_images, _BLOCK_SIZE))
    _simulate_rows(plan, rows[:1])  # compiles
    started = time.process_time()
    content = shards.encode(_simulate_rows(plan, rows), plan.simulation, plan.split, processor())
    cpu_seconds = time.process_time() - started
    missing = {dataset.shard_name(number) for number in range(plan.num_shards)} - dataset.standing_shards(uri)
    num_left = min(len(missing) * plan.shard_size, plan.num_images)
    address = os.environ.get("RAY_ADDRESS")
    return Estimate(
        num_standing=plan.num_shards - len(missing),
        bytes=len(content) * plan.num_images // len(rows),
        cpu_hours=cpu_seconds * num_left / len(rows) / 3600,
        where=f"on the Ray cluster at {address}" if address else f"on the {os.cpu_count()} cores of this machine",
    )


class Made:
    """What has come of the shards so far."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.statistics: dict[str, shards.Statistics] = {}
        self.processors: set[str] = set()
        self.num_images = self.num_made = self.num_images_made = 0
        self.cpu_seconds = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Note what a task says of a shard (`row`)."""
        entry = Entry(name=row["name"], rows=row["rows"], bytes=row["bytes"], sha256=row["sha256"])
        self.entries[entry.name] = entry
        for name, values in json.loads(row["statistics"]).items():
            statistics = shards.Statistics(*values)
            self.statistics[name] = self.statistics[name] + statistics if name in self.statistics else statistics
        self.processors.add(row["processor"])
        self.num_images += entry.rows
        self.num_made += row["made"]
        self.num_images_made += entry.rows * row["made"]
        self.cpu_seconds += row["cpu_seconds"]


def _standing_manifest(uri: str) -> dataset.Manifest | None:
    """Return the manifest if it is whole; what is in it can be found again."""
    try:
        return dataset.read_manifest(uri)
    except ValueError:
        storage.remove(storage.join(uri, "manifest.json"))
        return None


def _stand_or_make(uri: str, plan: Plan, manifest: dataset.Manifest | None) -> ray.data.Dataset:
    """Return what each shard is, once it stands, as rows."""
    fits = manifest is not None and len(manifest.shards) == plan.num_shards
    # As an array all tasks of a node read the same memory, however long the manifest.
    known = ray.put(np.array([entry.sha256 for entry in manifest.shards]) if manifest and fits else None)
    num_cpus = cluster.num_cpus_that_simulate() or _NUM_CPUS_TO_COME
    num_tasks = math.ceil(plan.num_shards / _shards_per_task(plan.num_shards, num_cpus))
    numbers = cluster.numbers(plan.num_shards, num_tasks, where=cluster.where_to_simulate())
    return numbers.map_batches(partial(_make_shards, uri=uri, plan=plan, known=known), batch_size=None)


def _shards_per_task(num_shards: int, num_cpus: int) -> int:
    """Return how many shards a task makes.

    A core idles for some 0.13 s between two tasks, and at the end for half a task on average; a
    shard takes it some 0.7 s. For s shards a core and t a task the sum 0.13 s / t + 0.35 t is
    least at this t.
    """
    return max(round(math.sqrt(0.37 * num_shards / num_cpus)), 1)


def _make_shards(
    numbers: dict[str, np.ndarray], *, uri: str, plan: Plan, known: ray.ObjectRef
) -> Iterator[dict[str, list[Any]]]:
    """Find shards sound or make them; while one is on its way to storage, the next is simulated."""
    checksums = ray.get(known)
    begun = time.process_time()
    # One thread: more than two shards at a time would fill the memory.
    with ThreadPoolExecutor(1) as placing:
        on_its_way: Future[tuple[Found, bool]] | None = None
        for number in map(int, numbers["id"]):
            place = _stand_or_simulate(uri, plan, number, None if checksums is None else str(checksums[number]))
            if on_its_way is not None:
                yield row(*on_its_way.result(), cpu_seconds=time.process_time() - begun)
                begun = time.process_time()
            on_its_way = placing.submit(place)
        assert on_its_way is not None
        yield row(*on_its_way.result(), cpu_seconds=time.process_time() - begun)


def _stand_or_simulate(uri: str, plan: Plan, number: int, known: str | None) -> Callable[[], tuple[Found, bool]]:
    """Return what will put a shard in its place, if it must, and say what stands there and whether it is new."""
    standing, found = dataset.find_shard(uri, plan, number, known)
    if found is not None:
        return lambda: (found, False)
    made = shards.encode(_simulate_rows(plan, plan.rows(number)), plan.simulation, plan.split, processor())
    return lambda: dataset.place_shard(uri, plan, number, made, standing)


def _simulate_rows(plan: Plan, rows: range) -> pa.Table:
    tables = []
    for first in range(rows.start, rows.stop, _BLOCK_SIZE):
        block = range(first, min(first + _BLOCK_SIZE, rows.stop))
        tables.append(shards.to_table(simulate_block(plan.simulation, block, plan.split), plan.simulation))
    return pa.concat_tables(tables).combine_chunks()


def row(found: Found, made: bool, *, cpu_seconds: float) -> dict[str, list[Any]]:
    """Return what a task says of a shard that stands, as a batch of one row."""
    statistics = {name: astuple(values) for name, values in found.provenance.statistics.items()}
    values = {
        **found.entry.as_dict(),
        "made": made,
        "processor": found.provenance.processor,
        "statistics": json.dumps(statistics),  # text: Arrow's nested types cost the driver 3 ms a shard
        "cpu_seconds": cpu_seconds,
    }
    return {name: [value] for name, value in values.items()}
