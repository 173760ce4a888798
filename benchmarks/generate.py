"""How much of the engine's rate `raylens simulate` keeps, end to end into Parquet.

The engine's rate is that of one process on one core; the end-to-end rate is counted once running,
from the first finished shards to the last. Both are measured in turn, several times, in one run on one machine;
two engines at once show what the machine itself loses when all its cores work.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from statistics import median

from raylens.config import Experiment
from raylens.simulate import simulate_block

SIMULATION = Experiment().simulation
BLOCK = 128


def engine(seconds: float) -> float:
    """Return images per second of this process, rendering blocks for some seconds."""
    simulate_block(SIMULATION, [0])
    started = time.perf_counter()
    num_images = 0
    while time.perf_counter() - started < seconds:
        simulate_block(SIMULATION, range(num_images, num_images + BLOCK))
        num_images += BLOCK
    return num_images / (time.perf_counter() - started)


def end_to_end(num_images: int, num_cpus: int) -> float:
    """Return images per second of `simulate`, once running."""
    from raylens import generate

    told: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as root:
        generate.simulate(
            SIMULATION,
            root,
            recipe="benchmark",
            num_images=num_images,
            progress=lambda done, total, detail: told.append((time.perf_counter(), done)),
        )
    return once_running(told, num_cpus)


def once_running(told: list[tuple[float, int]], num_cpus: int) -> float:
    """Return images per second from the first finished tasks to the last, of what was told when."""
    return between(*(steady(told, num_cpus)[k] for k in (0, -1)))


def steady(told: list[tuple[float, int]], num_cpus: int) -> list[tuple[float, int]]:
    """Return when how many images were done, at the end of each task while all cores were at work."""
    # The shards of a task are told of at once.
    tasks = [before for before, after in pairwise(told) if after[0] - before[0] > 0.05] + told[-1:]
    # The first task of each core includes the start of its process; at the end one waits for the other.
    return tasks[num_cpus - 1 : len(tasks) - num_cpus + 1]


def between(begun: tuple[float, int], ended: tuple[float, int]) -> float:
    """Return images per second between two moments."""
    return (ended[1] - begun[1]) / (ended[0] - begun[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=48 * 1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    num_cpus = len(os.sched_getaffinity(0))

    alone, together, whole = [], [], []
    with ProcessPoolExecutor(num_cpus) as pool:
        list(pool.map(engine, [0.1] * num_cpus))
        for _ in range(arguments.repeats):
            alone.append(pool.submit(engine, 4.0).result())
            together.append(sum(pool.map(engine, [4.0] * num_cpus)))
            whole.append(end_to_end(arguments.images, num_cpus))
    rates = {"engine_one_core": median(alone), "engine_all_cores": median(together), "simulate": median(whole)}
    share = rates["simulate"] / (num_cpus * rates["engine_one_core"])
    print(f"engine, one core          {rates['engine_one_core']:8,.0f} images/s")
    print(f"engines, {num_cpus} cores at once  {rates['engine_all_cores']:8,.0f} images/s")
    print(f"raylens simulate          {rates['simulate']:8,.0f} images/s   {share:.2f} of {num_cpus} x one core")
    print(json.dumps({"num_cpus": num_cpus, **rates, "share": share}))


if __name__ == "__main__":
    main()
