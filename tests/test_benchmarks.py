"""What measures a GPU runs where there is none, so that it is sound when one is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN_GPU = Path(__file__).parents[1] / "benchmarks" / "train_gpu.py"
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
