"""What changes from ten thousand images to a million, and how many cores one driver can keep busy.

Datasets of growing size are made by one driver after another; the engine's rate on one core is
measured in the same run, before and after each. Two cores cannot show the ceiling of the driver, so
that is measured apart, with shards that cost nothing: how many of them a second pass through Ray
Data and what the driver notes of each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from generate import SIMULATION, between, engine, steady

PAGE = os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--to", default=None, help="where the datasets go, and are removed from; a temporary folder")
    parser.add_argument("--num-empty-tasks", type=int, default=1000)
    arguments = parser.parse_args()
    num_cpus = len(os.sched_getaffinity(0))
    print(f"{num_cpus} cores")
    facts: dict[str, Any] = {"num_cpus": num_cpus, "sizes": []}

    engine_rates = [alone(engine, 4.0)]
    for num_images in arguments.images:
        with tempfile.TemporaryDirectory(dir=arguments.to) as root:
            facts["sizes"].append(alone(simulate, root, num_images, num_cpus))
        engine_rates.append(alone(engine, 4.0))
        tell(facts["sizes"][-1])
    facts["engine"] = median(engine_rates)
    for size in facts["sizes"]:
        size["share"] = size["images_per_second"] / (num_cpus * facts["engine"])
        print(f"{size['num_images']:10,} images: {size['share']:.2f} of {num_cpus} x one core's {facts['engine']:,.0f}")

    facts["driver"] = [alone(empty_shards, arguments.num_empty_tasks, per_task) for per_task in (1, 8, 32)]
    for row in facts["driver"]:
        print(
            f"{row['shards_per_task']:3} empty shards a task: {row['shards_per_second']:8,.0f} shards/s, "
            f"{1e6 * row['driver_seconds_per_shard']:6.0f} us of the driver a shard, "
            f"{row['megabytes']:,.0f} MB in the end"
        )
    print(json.dumps(facts))


def alone(function: Any, *arguments: Any) -> Any:
    """Return what a function returns in a process of its own: a driver has the memory of one run only."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def simulate(root: str, num_images: int, num_cpus: int) -> dict[str, Any]:
    """Return how fast a dataset is made, verified and read, and in how much memory."""
    from raylens import dataset, generate

    told: list[tuple[float, int]] = []
    driver: list[int] = []  # [bytes]

    def progress(done: int, total: int, detail: str) -> None:
        told.append((time.perf_counter(), done))
        driver.append(resident("self"))

    with watching_workers() as peak:
        made = generate.simulate(SIMULATION, root, recipe="scale", num_images=num_images, progress=progress)
    standing = dataset.Dataset.open(made.dataset)
    moments = steady(told, num_cpus)
    first, middle, last = moments[0], moments[len(moments) // 2], moments[-1]
    return {
        **asdict(made),
        "images_per_second_overall": made.images_per_second,
        "images_per_second": between(first, last),
        "first_half": between(first, middle),
        "second_half": between(middle, last),
        "driver_megabytes": [driver[0] / 1e6, max(driver) / 1e6],
        "worker_megabytes": max(peak) / 1e6,
        "bytes_per_image": sum(entry.bytes for entry in standing.manifest.shards) / num_images,
        "seconds_to_simulate": made.seconds - made.seconds_to_start - made.seconds_to_finish,
        "seconds_to_verify": seconds(lambda: dataset.verify(made.dataset)),
        "seconds_to_read_labels": seconds(lambda: standing.read(["num_subhalos", "alpha"])),
    }


def tell(size: dict[str, Any]) -> None:
    lines = [
        "{num_images:,} images in {seconds:.0f} s: start {seconds_to_start:.1f}, simulate {seconds_to_simulate:.1f}, "
        "finish {seconds_to_finish:.1f}; verify {seconds_to_verify:.1f}, read labels {seconds_to_read_labels:.1f} s",
        "{images_per_second:,.0f} images/s once running (first half {first_half:,.0f}, second {second_half:,.0f}), "
        "{images_per_second_overall:,.0f} overall; {bytes_per_image:,.0f} bytes an image",
        "driver {driver_megabytes[0]:,.0f} MB at the first shard, {driver_megabytes[1]:,.0f} at most; "
        "a worker {worker_megabytes:,.0f}",
    ]
    print("\n    ".join(lines).format(**size), flush=True)


def empty_shards(num_tasks: int, shards_per_task: int) -> dict[str, float]:
    """Return how many shards that cost nothing go through Ray Data, and what one costs the driver."""
    import ray.data

    from raylens import cluster, dataset, generate, shards

    def make_nothing(numbers: dict[str, np.ndarray]) -> Iterator[dict[str, list[Any]]]:
        statistics = {name: shards.Statistics(1024, 0.0, 1.0, -1.0, 1.0) for name in ("image", *shards.TRUTH)}
        for number in map(int, numbers["id"]):
            entry = dataset.Entry(name=dataset.shard_name(number), rows=1024, bytes=15_160_325, sha256="0" * 64)
            found = dataset.Found(entry, shards.Provenance({}, "any", "any", statistics))
            yield generate.row(found, made=True, cpu_seconds=0.7)

    cluster.connect()
    made = generate.Made()
    num_shards = num_tasks * shards_per_task
    numbers = ray.data.range(num_shards, override_num_blocks=num_tasks)
    num_before, started, cpu_started = 0, 0.0, 0.0
    rows = numbers.map_batches(make_nothing, batch_size=None)
    for task in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
        for facts in task.to_pylist():
            made.add(facts)
        if num_before == 0 and len(made.entries) >= num_shards // 10:  # by now workers run
            num_before, started, cpu_started = len(made.entries), time.perf_counter(), time.process_time()
    counted = num_shards - num_before
    return {
        "megabytes": resident("self") / 1e6,
        "shards_per_task": shards_per_task,
        "shards_per_second": counted / (time.perf_counter() - started),
        "driver_seconds_per_shard": (time.process_time() - cpu_started) / counted,
    }


@contextmanager
def watching_workers() -> Iterator[list[int]]:
    """Give the memory of the largest worker [bytes], every second."""
    largest, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            largest.extend(resident(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_worker(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield largest
    finally:
        ended.set()
        watcher.join()


def is_worker(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith((b"ray::ReadRange", b"ray::IDLE"))
    except OSError:
        return False  # it has just ended


def resident(pid: str) -> int:
    """Return the memory of a process that is its own [bytes]: what it shares with Ray's store is not counted twice."""
    try:
        _, size, shared, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    except OSError:
        return 0
    return (size - shared) * PAGE


def seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
