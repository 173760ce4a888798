"""Two runs of one dataset at once, on two kinds of processor: numba compiles for the one that it is told."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylens import dataset, shards, storage
from raylens.config import Experiment, Simulation
from raylens.physics.render import processor

OTHER = "generic"  # without the wide vectors and the approximate roots of this one
NUM_SHARDS, SHARD_SIZE = 12, 64


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """The paper's lenses in small images."""
    simulation = Simulation().override({"camera.num_pixels": 16, "camera.pixel_scale": 0.4})
    path = tmp_path_factory.mktemp("recipe") / "two.json"
    path.write_text(json.dumps(Experiment(name="two", simulation=simulation).as_dict()))
    return str(path)


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """The shards as each kind of processor makes them alone."""
    made = {}
    for kind in (processor(), OTHER):
        uri = finish(begin(recipe, str(tmp_path_factory.mktemp("alone")), kind))["dataset"]
        made[kind] = contents(uri)
    return made


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path) -> str:
    return str(tmp_path) if request.param == "local" else f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex[:8]}"


def begin(recipe: str, root: str, kind: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable, "-m", "raylens", "simulate", recipe, "--to", root,
            "--num-images", str(NUM_SHARDS * SHARD_SIZE), "--shard-size", str(SHARD_SIZE), "--quiet",
        ],
        env=os.environ | ({"NUMBA_CPU_NAME": kind} if kind == OTHER else {}),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(run: subprocess.Popen) -> dict:
    out, errors = run.communicate(timeout=180)
    assert run.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def contents(uri: str) -> dict[str, bytes]:
    return {name: storage.read(storage.join(uri, name)) for name in dataset.standing_shards(uri)}


def processor_of(content: bytes) -> str:
    return shards.provenance(content).processor


def test_the_two_processors_differ_in_last_bits_only(alone):
    """Else the tests below would show nothing; and how far they may differ is what the documents say."""
    this, other = (
        pa.concat_tables(pq.read_table(pa.BufferReader(made[name])) for name in sorted(made)) for made in alone.values()
    )

    assert (shards.images(this) != shards.images(other)).any()
    assert abs(shards.images(this) - shards.images(other)).max() < 1e-5
    assert shards.agree(this, other)


def test_two_runs_at_once_end_in_one_dataset_that_verifies(recipe, root, alone):
    """Somebody submits twice, or a cluster restarts a job that still runs, on whatever machines there are."""
    runs = [begin(recipe, root, kind) for kind in alone]

    facts = [finish(run) for run in runs]

    uri = facts[0]["dataset"]
    assert facts[1]["dataset"] == uri
    assert dataset.verify(uri) == []
    made = contents(uri)
    assert sum(run["num_made"] for run in facts) == NUM_SHARDS  # none was made and then lost
    for name, content in made.items():
        assert content == alone[processor_of(content)][name]
    assert dataset.read_manifest(uri).processors == sorted({processor_of(content) for content in made.values()})


@pytest.mark.slow
def test_two_runs_that_mend_the_same_dataset_at_once_end_in_one_that_verifies(recipe, tmp_path, alone):
    """The manifest knows the checksums of one processor; neither run may take the other's shards for damage."""
    uri = finish(begin(recipe, str(tmp_path), processor()))["dataset"]
    for number in range(0, NUM_SHARDS, 2):
        place = Path(dataset.shard_uri(uri, number))
        place.write_bytes(place.read_bytes()[:-100])
    runs = [begin(recipe, str(tmp_path), kind) for kind in alone]

    facts = [finish(run) for run in runs]

    assert dataset.verify(uri) == []
    assert sum(run["num_made"] for run in facts) == NUM_SHARDS // 2
    assert all(content == alone[processor_of(content)][name] for name, content in contents(uri).items())
