"""What a stranger may have written: datasets, networks and images that mean harm are refused before they do any."""

import ast
import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from astropy.io import fits
from test_models import card

from raylens import models
from raylens.dataset import Dataset

ABSURD = 10**15


class Harm:
    """What, unpickled, leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.fixture(autouse=True)
def no_harm(tmp_path_factory, request) -> None:
    """Neither a file beside the test's own, nor memory for what is not there."""
    base = tmp_path_factory.getbasetemp()
    memory = most_held(anew=True)
    yield
    assert [path for folder in (base.parent, base) for path in folder.glob("outside*")] == []
    assert most_held() - memory < 500_000  # kB; what is claimed would be more


def most_held(*, anew: bool = False) -> int:
    """The most memory that this process has held [kB], ever or from now on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def test_memory_that_was_given_back_is_seen_all_the_same():
    """Otherwise the check above would find nothing in the middle of a long run."""
    for _ in range(2):
        before = most_held(anew=True)
        np.ones(75_000_000)  # 600 MB

        assert most_held() - before > 500_000
    most_held(anew=True)


@pytest.fixture
def data(make_dataset, tiny, tmp_path) -> Path:
    return Path(make_dataset(tmp_path / "data", tiny, with_card=True))


@pytest.fixture
def change(data) -> Callable[..., None]:
    """Change values of a file of the dataset by their dotted keys."""

    def change(name: str, **changes: object) -> None:
        values = json.loads((data / name).read_text())
        for key, value in changes.items():
            *groups, last = key.split("__")
            place = values
            for group in groups:
                place = place[int(group) if group.isdigit() else group]
            place[last] = value
        (data / name).write_text(json.dumps(values))

    return change


HARM = [
    ("dataset.json", {"recipe": "../../../outside"}, r"recipe|name"),
    ("dataset.json", {"split": "../../outside"}, r"is no split|is not a dataset's"),
    ("dataset.json", {"num_images": "10"}, "num_images"),
    ("dataset.json", {"shard_size": ABSURD, "num_images": ABSURD}, r"shard_size"),
    ("dataset.json", {"num_images": 10**400}, r"shards of the|at most"),
    ("dataset.json", {"simulation__camera__num_pixels": ABSURD}, "num_pixels"),
    ("dataset.json", {"simulation__surprise": 1}, "surprise"),
    ("manifest.json", {"shards__0__name": "../../../../etc/passwd"}, "does not list the shards"),
    ("manifest.json", {"shards__0__name": "/etc/passwd"}, "does not list the shards"),
    ("manifest.json", {"shards__0__rows": ABSURD}, "does not list the shards"),
    ("manifest.json", {"shards": {}}, "shards"),
    ("manifest.json", {"num_images": None}, "num_images"),
]
# To simulate again takes nothing from the manifest but checksums: the rows are made anew.
MEANT = [
    (verb, *harm)
    for verb in ("train", "predict", "simulate", "evaluate", "export") for harm in HARM
    if (verb, harm[0]) != ("simulate", "manifest.json")
]  # fmt: skip


@pytest.mark.parametrize(
    ("verb", "name", "changes", "complaint"), MEANT, ids=lambda value: re.sub(r"\W+", "-", str(value))[:40]
)
def test_a_dataset_whose_json_means_harm_is_refused(verb, name, changes, complaint, data, change, main, tmp_path, run):
    """Its names become paths and its numbers sizes, on a machine with credentials."""
    change(name, **changes)
    new = str(tmp_path / "new")
    both = ("--n-cnn", run, "--alpha-cnn", run)
    commands = {
        "train": ("train", "n-cnn", "--data", str(data), "--to", new, "--recipe", "smoke"),
        "predict": ("predict", *both, "--images", str(data), "--to", new),
        "simulate": ("simulate", str(data), "--to", new, "--dry-run"),
        "evaluate": ("evaluate", *both, "--data", str(data), "--to", new),
        "export": ("export", str(data), "--index", "0", "--to", f"{new}.fits"),
    }
    ran = main(*commands[verb])

    assert ran.returncode == 1
    (error,) = ran.errors
    assert re.search(complaint, error), error
    assert not (tmp_path / "new").exists()


@pytest.fixture
def run(tmp_path) -> str:
    """The run of an N-CNN."""
    folder = str(tmp_path / "run")
    models.save(folder, safetensors.torch.save(models.build(card()).state_dict()), card())
    return folder


@pytest.mark.parametrize("name", ["dataset.json", "manifest.json"])
@pytest.mark.parametrize("how", ["large", "deep"])
def test_json_that_is_too_large_or_too_deep_is_not_taken_in(name, how, data):
    """A file of terabytes costs nothing where it has holes, and brackets in brackets break what reads them."""
    with open(data / name, "wb") as file:
        file.truncate(ABSURD // 1000) if how == "large" else file.write(b'{"a":' * 10**6)

    with pytest.raises(ValueError, match="has 1,000,000,000,000 bytes" if how == "large" else "is not JSON"):
        Dataset.open(str(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"filters": [10**9, 10**9]},
        {"dense": ABSURD},
        {"dense": 2**62},
        {"kernel_size": 10**6 + 1},
        {"filters": [2] * 64},
        {"filters": "2"},
        {"dropout": float("nan")},
    ],
    ids=str,
)
def test_a_model_json_of_an_absurd_network_is_refused_before_it_is_built(changes, run):
    """A line of JSON can describe a network of petabytes, which the file of weights cannot hold."""
    place = Path(run, "model.json")
    values = json.loads(place.read_text())
    values["model"] |= changes
    place.write_text(json.dumps(values))

    with pytest.raises(ValueError, match=r"does not hold the weights|does not describe a network|pool images"):
        models.load(run, "n-cnn")


def header_of(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


@pytest.mark.parametrize(
    "weights",
    [
        header_of(2**63 - 1),
        header_of(10**8, b'{"a": '),
        header_of(72, b'{"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}'),
        header_of(65, b'{"x":{"dtype":"F32","shape":[1,1],"data_offsets":[0,1099511627776]}}'),
        b"",
    ],
    ids=["length", "cut", "shape", "offsets", "nothing"],
)
def test_safetensors_that_claim_what_is_not_there_are_refused(weights, run):
    """As long as the file is as large as the network, which is looked at first, its header decides."""
    needed = len(safetensors.torch.save(models.build(card()).state_dict()))
    for content in (weights, weights.ljust(needed, b" ")):
        Path(run, "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="does not hold the weights"):
            models.load(run, "n-cnn")


def test_a_file_of_weights_that_has_terabytes_is_not_read(run):
    """Its size is asked for first."""
    with open(Path(run, "model.safetensors"), "r+b") as file:
        file.truncate(ABSURD // 1000)

    with pytest.raises(ValueError, match="and it has 1,000,000,000,000"):
        models.load(run, "n-cnn")


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_a_pickle_in_a_run_is_not_unpickled(name, run, tmp_path):
    """As torch's own checkpoints are."""
    trace = tmp_path / "trace"
    torch.save(Harm(trace), Path(run, name))

    with pytest.raises(ValueError, match=r"does not hold the weights|is not JSON"):
        models.load(run, "n-cnn")
    assert not trace.exists()


def npy_of(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def fits_of_nothing(num_pixels: int) -> bytes:
    """A compressed image of so many pixels on each side, in a few bytes."""
    content = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), fits.CompImageHDU(np.zeros((64, 64), np.int16))]).writeto(content)
    sides = (f"ZNAXIS{axis}".ljust(8).encode() + b"= " + b"%20d" for axis in (1, 2))
    found = content.getvalue()
    for side in sides:
        assert side % 64 in found
        found = found.replace(side % 64, side % num_pixels)
    return found


def parquet_of_nothing(num_rows: int) -> bytes:
    """Images of zeros, each of which costs a few bits."""
    line = pa.list_(pa.field("element", pa.float32(), nullable=False), 60)
    kind = pa.list_(pa.field("element", line, nullable=False), 60)
    zeros = pa.array(np.zeros(num_rows * 3600, np.float32))
    lines = pa.FixedSizeListArray.from_arrays(zeros, type=line)
    content = io.BytesIO()
    image = pa.FixedSizeListArray.from_arrays(lines, type=kind)
    pq.write_table(pa.table({"image": image}), content, compression="zstd")
    return content.getvalue()


BOMBS = {
    "bomb.parquet": lambda trace: parquet_of_nothing(1000),
    "bomb.fits.gz": lambda trace: gzip.compress(bytes(20_000_000)),
    "bomb.fits": lambda trace: fits_of_nothing(100_000),
    "absurd.npy": lambda trace: npy_of(np.zeros((2, 8, 8))).replace(b"(2, 8, 8)", b"(2, 8,%d)" % ABSURD),
    "pickle.npy": lambda trace: npy_of(np.array([Harm(trace)], object)),
    "pickle.parquet": lambda trace: pickle.dumps(Harm(trace)),
    "pickle.fits": lambda trace: pickle.dumps(Harm(trace)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_images_that_mean_harm_are_a_reason(name, tmp_path):
    """Of a million files one is bad: it is told, and the others are predicted."""
    from raylens import intake

    trace = tmp_path / "trace"
    content = BOMBS[name](trace)

    found = list(intake.read(name, content))

    assert found
    assert all(isinstance(one, str) for one in found), found
    assert not trace.exists()


def test_a_shard_that_would_fill_the_memory_is_refused(data, main, tmp_path):
    """Its checksum says nothing against it, where the same stranger wrote the manifest."""
    (data / "part-00000.parquet").write_bytes(parquet_of_nothing(1000))

    ran = main("export", str(data), "--index", "0", "--to", str(tmp_path / "new.fits"))

    assert ran.returncode == 1
    assert "in memory, more than images can" in ran.errors[0]


@pytest.mark.parametrize(
    "call",
    [
        "torch.load('x')", "pickle.loads(b'x')", "cloudpickle.loads(b'x')", "marshal.loads(b'x')", "eval('x')",
        "exec('x')", "ray.tune.Tuner.restore('x', print)", "yaml.load('x', yaml.Loader)",
    ],
)  # fmt: skip
def test_the_linter_refuses_what_would_run_what_it_reads(call):
    """The next one who needs a quick way to load something is told before it lands."""
    names = {"torch", "pickle", "cloudpickle", "marshal", "yaml", "ray"} & {call.split(".")[0]}
    source = "".join(f"import {name}\n" for name in names) + f"\nprint({call})\n"
    command = [Path(sys.executable).with_name("ruff"), "check", "--quiet", "--stdin-filename", "raylens/new.py", "-"]

    found = subprocess.run(command, input=source, capture_output=True, text=True, cwd=Path(__file__).parents[1])

    codes = set(re.findall(r"^([A-Z]+\d+) ", found.stdout, re.MULTILINE))
    assert codes & {"S102", "S301", "S302", "S307", "S506", "TID251"}, found.stdout


def test_no_array_is_unpickled():
    """numpy unpickles arrays of objects where it is told to, and the linter does not know that."""
    root = Path(__file__).parents[1]
    told = [
        (path.name, ast.unparse(node.value))
        for folder in ("raylens", "jobs", "cluster", "benchmarks", "docs")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle"
    ]

    assert {value for _, value in told} == {"False"}, told  # it is said where it matters
