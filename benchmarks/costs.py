"""What simulation, training and prediction cost, computed from the rates that the other benchmarks measured.

    python benchmarks/costs.py                                            # the tables of docs/operations.md
    python benchmarks/costs.py 3e6 --epochs 20 --core-hour 0.03 --gpu-hour 2.5   # yours

Hours of cores and GPUs are for images of 60 x 60 pixels and the paper's two networks. A cluster is taken to be as fast
as so many single machines, which holds for simulation as far as docs/scaling.md says.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

# docs/benchmarks.md and docs/scaling.md, measured on the machines that they name.
CORE_MILLISECONDS = 0.85  # an image, Ray and idling included
BYTES = 14_807  # an image
PREDICTED = 1_050  # images/s through both networks, two cores
TWO_CORES = {"n-cnn": 614, "alpha-cnn": 1_315}  # images/s, 16 a step
ONE_GPU = {16: {"n-cnn": 26_482, "alpha-cnn": 42_253}, 256: {"n-cnn": 104_199, "alpha-cnn": 235_989}}
GPU_GIGABYTES = 141  # of that GPU, of whose memory a training keeps images in at most 0.4

CORES = (2, 56, 224)  # as measured; 4 and 16 of the CPU nodes of cluster/kuberay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("num_images", nargs="*", type=float, default=[1e5, 1e6, 1e7])
    parser.add_argument("--epochs", type=int, default=100, help="of each network; the paper's 100")
    parser.add_argument("--core-hour", type=float, default=0.015, metavar="USD", help="of a core on spot")
    parser.add_argument("--gpu-hour", type=float, default=4.0, metavar="USD", help="of a GPU and its node")
    parser.add_argument("--terabyte-month", type=float, default=23.0, metavar="USD", help="of object storage")
    options = parser.parse_args()
    print(simulation(options.num_images, options.core_hour, options.terabyte_month))
    print()
    print(training(options.num_images, options.epochs, options.gpu_hour))


def simulation(nums_images: Iterable[float], core_hour: float, terabyte_month: float) -> str:
    """Return what images cost to make and to keep, as a table of Markdown."""
    times = [f"on {cores} cores" for cores in CORES]
    rows = []
    for num_images in nums_images:
        hours = num_images * CORE_MILLISECONDS / 3.6e6
        terabytes = num_images * BYTES / 1e12
        rows.append([
            f"{num_images:,.0f}", f"{hours:.2g}", *(duration(3600 * hours / cores) for cores in CORES),
            f"{hours * core_hour:.2g}", f"{1e3 * terabytes:,.1f}", f"{terabytes * terabyte_month:.2g}",
        ])  # fmt: skip
    head = ["images", "core-hours", *times, "computing [USD]", "size [GB]", "a month of it [USD]"]
    return table(head, rows)


def training(nums_images: Iterable[float], epochs: int, gpu_hour: float) -> str:
    """Return what both networks take to predict and to train; a dash where the images do not fit the GPU."""
    rows = []
    for num_images in nums_images:
        epoch = num_images * sum(1 / rate for rate in TWO_CORES.values())
        row = [f"{num_images:,.0f}", duration(num_images / PREDICTED), duration(epoch)]
        fits = num_images * 4 * 60**2 <= 0.4e9 * GPU_GIGABYTES
        for rates in ONE_GPU.values():
            seconds = num_images * sum(1 / rate for rate in rates.values())
            whole = f"{duration(epochs * seconds)}, {epochs * seconds / 3600 * gpu_hour:.2g} USD"
            row += [duration(seconds), whole] if fits else ["–", "–"]
        rows.append(row)
    of_gpu = [told for size in ONE_GPU for told in (f"on a GPU, {size} a step", f"{epochs} epochs there")]
    return table(["images", "predicted on 2 cores", "an epoch on 2 cores, 16 a step", *of_gpu], rows)


def duration(seconds: float) -> str:
    unit, length = next((one for one in (("h", 3600), ("min", 60)) if seconds >= 2 * one[1]), ("s", 1))
    return f"{seconds / length:,.{0 if seconds >= 10 * length else 1}f} {unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
