"""What measures a GPU runs where there is none, to be sound when one is at hand; costs and metrics are as told."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from raylens.cluster import METRICS

ROOT = Path(__file__).parents[1]
TRAIN_GPU = ROOT / "benchmarks" / "train_gpu.py"
COSTS = ROOT / "benchmarks" / "costs.py"
WITHOUT_RAY = """
import runpy, sys
sys.modules["ray"] = None  # every import of it fails from here on
path, *sys.argv = sys.argv[1], *sys.argv[1:]
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("made", [True, False])
def test_training_is_measured_without_ray_and_without_a_gpu(made, make_dataset, tiny, tmp_path):
    """A lone GPU box has torch and little else; the last line is what a machine reads."""
    if made:
        data = ["--images", "60", "--pixels", "8"]
    else:
        dataset = Path(make_dataset(tmp_path, tiny, num_images=60, shard_size=40))
        data = ["--data", *map(str, sorted(dataset.glob("*.parquet")))]
    options = ["--device", "cpu", "--batch-sizes", "16", "32", "--seconds", "0.01", "--repeats", "1"]

    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY, str(TRAIN_GPU), *data, *options],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(TRAIN_GPU.parents[1])},
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    facts = json.loads(ran.stdout.splitlines()[-1])
    assert (facts["device"], facts["images"]) == ("cpu", 60)
    assert [(row["network"], row["batch_size"], row["variant"]) for row in facts["rows"]] == [
        (network, batch_size, variant)
        for network in ("n-cnn", "alpha-cnn")
        for batch_size in (16, 32)
        for variant in ("eager", "eager, bfloat16")
    ]
    for row in facts["rows"]:
        # Four steps an epoch of 60 images and 16 a step, two of 32.
        assert row["images_per_second"] * row["milliseconds"] / 1e3 == pytest.approx(
            {16: 15, 32: 30}[row["batch_size"]]
        )
        assert row["papers_seconds"] * row["images_per_second"] == pytest.approx(1e7)


def test_the_costs_in_the_docs_are_those_of_the_measured_rates():
    """A benchmark that is run again changes a rate, and the tables that stand on it must follow."""
    tables = subprocess.run([sys.executable, COSTS], capture_output=True, text=True, check=True).stdout.split("\n\n")
    costs = runpy.run_path(str(COSTS))
    measured = (ROOT / "docs" / "benchmarks.md").read_text() + (ROOT / "docs" / "scaling.md").read_text()
    rates = [costs["BYTES"], costs["PREDICTED"], *costs["TWO_CORES"].values()]
    rates += [rate for of_size in costs["ONE_GPU"].values() for rate in of_size.values()]

    assert all(table.strip() in (ROOT / "docs" / "operations.md").read_text() for table in tables)
    assert [rate for rate in rates if f"{rate:,}" not in measured] == []
    assert f"{costs['CORE_MILLISECONDS']} ms of a core" in measured


def test_costs_are_computed_for_other_numbers_and_prices():
    """They are there to be replaced by one's own."""
    told = subprocess.run(
        [sys.executable, COSTS, "2e6", "--epochs", "10", "--core-hour", "0.1", "--gpu-hour", "36"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip

    simulation, training = (table.splitlines()[-1].split(" | ") for table in told.split("\n\n"))
    assert simulation[0] == "| 2,000,000"
    assert simulation[5] == "0.047"  # 2e6 x 0.85 ms = 0.472 core-hours
    assert training[4] == "20 min, 12 USD"  # 2e7 x (1/26,482 + 1/42,253) s = 1,229 s


def test_every_metric_is_in_the_docs():
    """An alert is written by who knows its name."""
    page = (ROOT / "docs" / "operations.md").read_text()

    assert [name for name in METRICS if f"| `ray_raylens_{name}` |" not in page] == []
