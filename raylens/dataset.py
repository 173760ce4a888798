"""What a row is, where shards live, when a dataset is complete, and how it is verified.

A dataset is a folder: `dataset.json` (the plan, written first), `part-00000.parquet` and so on
(the shards, each written whole or not at all), `README.md`, `illustration.json`, and
`manifest.json` (each shard's rows, bytes and checksum, written last: its presence means complete).
Shard k of shard size S holds rows [k S, (k + 1) S) in order and is a function of the Simulation,
the split, S and k alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from raylens import __version__, storage
from raylens.config import SIMULATOR_VERSION, SPLITS, Settings, Simulation

SHARD_SIZE = 1024  # images; a shard of 60 x 60 pixels is 15 MB

# The columns beside index and image: type, unit and meaning.
TRUTH: dict[str, tuple[pa.DataType, str, str]] = {
    "num_subhalos": (pa.int32(), "1", "number of subhaloes N"),
    "alpha": (pa.float32(), "1", "slope of the subhalo mass function"),
    "theta_E": (pa.float64(), "arcsec", "Einstein radius of the lens, intermediate-axis convention"),
    "q": (pa.float64(), "1", "minor over major axis of the lens mass"),
    "phi": (pa.float64(), "rad", "from the x-axis to the lens's major axis, counter-clockwise"),
    "x": (pa.float64(), "arcsec", "lens centre"),
    "y": (pa.float64(), "arcsec", "lens centre"),
    "z_lens": (pa.float64(), "1", "redshift of the lens"),
    "z_source": (pa.float64(), "1", "redshift of the source"),
    "sigma_v": (pa.float64(), "km/s", "velocity dispersion of the lens"),
    "lens_mass": (pa.float64(), "Msun", "mass of the lens"),
    "subhalo_mass": (pa.float64(), "Msun", "summed mass of the subhaloes"),
}
CATALOGUE: dict[str, tuple[str, str]] = {
    "subhalos_x": ("arcsec", "position of each subhalo, in the order in which they were drawn"),
    "subhalos_y": ("arcsec", "position of each subhalo"),
    "subhalos_mass": ("Msun", "mass of each subhalo"),
    "subhalos_theta_E": ("arcsec", "Einstein radius of each subhalo"),
}


class Plan(Settings):
    """What a dataset is to hold; `dataset.json`."""

    recipe: str
    split: str
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    simulator_version: int
    shard_size: Annotated[int, Field(ge=1)]
    num_images: Annotated[int, Field(ge=1)]
    versions: dict[str, str]  # of the software that began it
    simulation: Simulation

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.shard_size)

    def rows(self, shard: int) -> range:
        """Return the indices of a shard's rows."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))


class Shard(Settings):
    """A shard as the manifest knows it."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Manifest(Settings):
    """What a complete dataset holds; `manifest.json`."""

    num_images: int
    processors: list[str]  # the kinds that rendered it: last bits differ between them
    shards: list[Shard]


class Dataset:
    """A complete dataset: its URI, plan and manifest."""

    def __init__(self, uri: str, plan: Plan, manifest: Manifest) -> None:
        self.uri, self.plan, self.manifest = uri, plan, manifest

    @classmethod
    def open(cls, uri: str) -> Self:
        """Return the dataset at a URI; ValueError if there is none, or if it is not complete."""
        uri = storage.absolute(uri)
        plan = read_plan(uri)
        manifest = read_manifest(uri)
        if manifest is None:
            standing = len(standing_shards(uri))
            root = uri.rsplit("/", 1)[0]
            raise ValueError(
                f"{uri} has {standing} of {plan.num_shards} shards and no manifest, so simulation did not finish. Run "
                f"`raylens simulate RECIPE --to {root}` again as before; finished shards are kept."
            )
        return cls(uri, plan, manifest)

    @property
    def num_images(self) -> int:
        return self.plan.num_images

    @property
    def num_pixels(self) -> int:
        return self.plan.simulation.camera.num_pixels

    @property
    def shard_uris(self) -> list[str]:
        return [storage.join(self.uri, shard.name) for shard in self.manifest.shards]

    def read(self, columns: list[str]) -> dict[str, np.ndarray]:
        """Return columns of numbers of the whole dataset, without its images, in the order of the rows."""
        with ThreadPoolExecutor(8) as pool:
            table = pa.concat_tables(pool.map(lambda uri: read_shard(uri, columns), self.shard_uris))
        return {name: table[name].to_numpy() for name in columns}


def location(root: str, *, recipe: str, split: str, simulation: Simulation) -> str:
    """Return the URI of the dataset that a simulation of a split makes below a root."""
    return storage.join(storage.absolute(root), f"{recipe}-{split}-{simulation.digest}")


def read_plan(uri: str) -> Plan:
    """Return the plan of the dataset at a URI, complete or not; ValueError if there is none."""
    place = storage.join(uri, "dataset.json")
    if not storage.exists(place):
        raise ValueError(f"{uri} is no dataset: it has no dataset.json. `raylens simulate RECIPE --to ROOT` makes one.")
    return _parse(Plan, place)


def read_manifest(uri: str) -> Manifest | None:
    """Return the manifest of the dataset at a URI; None if it has none."""
    place = storage.join(uri, "manifest.json")
    return _parse(Manifest, place) if storage.exists(place) else None


def check_split(split: str) -> None:
    """Refuse a split that is none of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"{split} is no split; the splits are {', '.join(SPLITS)}.")


def begin(
    uri: str, *, recipe: str, split: str, simulation: Simulation, num_images: int, shard_size: int | None = None
) -> Plan:
    """Write the plan of a dataset, or extend the one that stands, and return it.

    Raises
    ------
    ValueError
        If a dataset of another shard size than the one asked for stands there, or one whose plan
        has been changed.
    """
    if storage.exists(storage.join(uri, "dataset.json")):
        plan = read_plan(uri)
        if (plan.simulation, plan.split) != (simulation, split):
            raise ValueError(
                f"{uri}/dataset.json describes another simulation than its name says, so it has been changed; "
                "remove that dataset, or choose another --to."
            )
        if shard_size not in (None, plan.shard_size):
            raise ValueError(
                f"{uri} has shards of {plan.shard_size} images; got --shard-size {shard_size}. "
                f"Leave it at {plan.shard_size}, or choose another --to."
            )
        if num_images <= plan.num_images:
            return plan
        storage.remove(storage.join(uri, "manifest.json"))  # first, or it would name a dataset that is not there
        plan = plan.override({"num_images": num_images})
    else:
        plan = Plan(
            recipe=recipe,
            split=split,
            digest=simulation.digest,
            simulator_version=SIMULATOR_VERSION,
            shard_size=shard_size or SHARD_SIZE,
            num_images=num_images,
            versions=versions(),
            simulation=simulation,
        )
    storage.write(storage.join(uri, "dataset.json"), _json(plan.as_dict()))
    return plan


def versions() -> dict[str, str]:
    """Return the versions of the software that decides a dataset's bytes."""
    return {
        "raylens": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
    }


def schema(simulation: Simulation, split: str) -> pa.Schema:
    """Return the columns of a dataset, each with its unit; the simulation in full is in the metadata."""

    def field(name: str, kind: pa.DataType, unit: str, meaning: str) -> pa.Field:
        return pa.field(name, kind, nullable=False, metadata={"unit": unit, "description": meaning})

    n = simulation.camera.num_pixels
    line = pa.list_(pa.field("element", pa.float32(), nullable=False), n)
    image = pa.list_(pa.field("element", line, nullable=False), n)
    unit = "1" if simulation.camera.normalise else "central surface brightness of the source"
    fields = [
        field("index", pa.int64(), "1", "row number, from which with seed and split all else follows"),
        field("image", image, unit, "pixels [row, column]; y grows with row and x with column"),
        *(field(name, *about) for name, about in TRUTH.items()),
    ]
    if simulation.output.catalogue:
        values = pa.list_(pa.field("element", pa.float64(), nullable=False))
        fields += [field(name, values, *about) for name, about in CATALOGUE.items()]
    about = {"simulator_version": SIMULATOR_VERSION, "split": split, "simulation": simulation.as_dict()}
    return pa.schema(fields, metadata={"raylens": json.dumps(about, sort_keys=True)})


def to_table(columns: dict[str, np.ndarray], simulation: Simulation, split: str) -> pa.Table:
    """Return simulated columns (`simulate.simulate_block`) as an Arrow table of `schema`."""
    kinds = schema(simulation, split)
    arrays = []
    for field in kinds:
        values = columns[field.name]
        if field.name == "image":
            n = values.shape[-1]
            lines = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(lines, type=field.type))
            assert arrays[-1].type.list_size == n
        elif field.name in CATALOGUE:
            starts = pa.array(columns["first_subhalo"].astype(np.int32))
            arrays.append(pa.ListArray.from_arrays(starts, pa.array(values), type=field.type))
        else:
            arrays.append(pa.array(values, field.type))
    return pa.Table.from_arrays(arrays, schema=kinds)


def images(table: pa.Table) -> np.ndarray:
    """Return the images of a table: float32, (rows, num_pixels, num_pixels), from its flat buffer."""
    column = table.column("image").combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # an empty table has no chunk to combine
        column = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    n = column.type.list_size
    return column.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, n, n)


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"part-{shard:05d}.parquet"


def standing_shards(uri: str) -> set[str]:
    """Return the names of the shards that stand, sound or not."""
    return {name for name in storage.names(uri) if re.fullmatch(r"part-\d{5,}\.parquet", name)}


def write_shard(uri: str, shard: int, table: pa.Table) -> Shard:
    """Write a shard whole or not at all, and return what the manifest is to know of it."""
    content = _parquet(table)
    storage.write(storage.join(uri, shard_name(shard)), content, durable=False)
    return _describe(shard, len(table), content)


def read_shard(uri: str, columns: list[str]) -> pa.Table:
    """Return columns of a shard; an OSError if a page of them is not what its checksum says."""
    file_system, path = storage.arrow_file_system(uri)
    return pq.read_table(path, columns=columns, filesystem=file_system, page_checksum_verification=True)


def sound_shard(uri: str, plan: Plan, shard: int, known: Shard | None) -> Shard | None:
    """Return what the manifest is to know of a shard that stands and is sound; None for any other.

    Where the manifest knows it, its checksum decides; else the shard must hold the rows, the
    columns and the simulation of the plan, each page its own checksum, and the whole be what is
    written of such a table.
    """
    place = storage.join(uri, shard_name(shard))
    try:
        content = storage.read(place)
    except storage.StorageError:
        if storage.exists(place):
            raise
        return None
    rows = plan.rows(shard)
    found = _describe(shard, len(rows), content)
    if known is not None and known.rows == len(rows):
        return found if found == known else None
    try:
        table = pq.read_table(io.BytesIO(content), page_checksum_verification=True)
    except (pa.ArrowException, OSError):
        return None
    fits = table.schema.equals(schema(plan.simulation, plan.split), check_metadata=True)
    if not fits or not np.array_equal(table["index"].to_numpy(), rows):
        return None
    # No checksum covers the headers and the footer, but the same pyarrow writes the same bytes again.
    changed = plan.versions.get("pyarrow") == pa.__version__ and _parquet(table) != content
    return None if changed else found


def finish(uri: str, plan: Plan, shards: list[Shard], processors: list[str]) -> Dataset:
    """Write the dataset card and, last, the manifest, unless they stand already."""
    assert [shard.name for shard in shards] == [shard_name(k) for k in range(plan.num_shards)]
    before = read_manifest(uri)
    kinds = sorted({*processors, *(before.processors if before else [])})
    manifest = Manifest(num_images=plan.num_images, processors=kinds, shards=shards)
    if manifest != before:
        storage.write(storage.join(uri, "README.md"), card(plan, manifest))
        storage.write(storage.join(uri, "manifest.json"), _json(manifest.as_dict()))
    return Dataset(uri, plan, manifest)


def verify(uri: str) -> list[str]:
    """Return what is wrong with the dataset at a URI, a line each; none if it is complete and sound."""
    uri = storage.absolute(uri)
    plan, manifest = read_plan(uri), read_manifest(uri)
    standing = standing_shards(uri)
    if manifest is None:
        return [f"no manifest, and {len(standing)} of {plan.num_shards} shards: simulation did not finish"]
    wrong = []
    if manifest.num_images != plan.num_images or len(manifest.shards) != plan.num_shards:
        wrong.append(f"the manifest counts {manifest.num_images} images, the plan {plan.num_images}")
    if plan.simulation.digest != plan.digest and plan.simulator_version == SIMULATOR_VERSION:
        wrong.append(
            f"dataset.json has been changed: its simulation has digest {plan.simulation.digest}, not {plan.digest}"
        )
    stray = sorted(standing - {shard.name for shard in manifest.shards})
    wrong += [f"{name} is not in the manifest" for name in stray]

    def fault(numbered: tuple[int, Shard]) -> str | None:
        number, shard = numbered
        if shard.name != shard_name(number):
            return f"the manifest names {shard.name} where {shard_name(number)} belongs"
        if shard.name not in standing:
            return f"{shard.name} is missing"
        if sound_shard(uri, plan, number, shard) is None:
            return f"{shard.name} is damaged: it is not what its checksum says"
        return None

    with ThreadPoolExecutor(8) as pool:
        wrong += [line for line in pool.map(fault, enumerate(manifest.shards)) if line]
    return wrong


def card(plan: Plan, manifest: Manifest) -> str:
    """Return the dataset card, in Markdown with the front matter that dataset hubs read."""
    columns = "\n".join(
        f"| `{field.name}` | {field.type} | " + " | ".join(text.decode() for text in field.metadata.values()) + " |"
        for field in schema(plan.simulation, plan.split)
    )
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    scale = plan.simulation.camera.pixel_scale
    return f"""---
license: cc0-1.0
pretty_name: {plan.recipe} {plan.split} {plan.digest}
configs:
- config_name: default
  data_files: part-*.parquet
---
# {plan.recipe}, split {plan.split}, digest {plan.digest}

{plan.num_images:,} simulated strong lenses with subhaloes, in {len(manifest.shards)} files ({megabytes:,.1f} MB).
Made by raylens {plan.versions.get("raylens", "")}, simulator version {plan.simulator_version}.
Every row is a function of the simulation in `dataset.json`, the split and its `index`.
`raylens verify` checks the files.

| column | type | unit | meaning |
|---|---|---|---|
{columns}

`image[row, column]`: y grows with row and x with column; pixel centres lie at (i - (n - 1) / 2) x {scale} arcsec.
"""


def batches(tables: Iterator[pa.Table]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Turn tables into (images, the other columns), for whatever trains or predicts."""
    for table in tables:
        others = {name: table[name].to_numpy() for name in table.column_names if name != "image"}
        yield images(table), others


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    # Noise does not compress. The checksum of each page finds a flipped bit before there is a manifest.
    pq.write_table(
        table, buffer, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True,
        row_group_size=max(len(table), 1), write_batch_size=1 << 16,
    )  # fmt: skip
    return buffer.getvalue()


def _describe(shard: int, rows: int, content: bytes) -> Shard:
    return Shard(name=shard_name(shard), rows=rows, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def _parse(kind: type[Any], place: str) -> Any:
    try:
        values = json.loads(storage.read(place))
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place} does not hold a JSON object.")
    try:
        return kind.parse(values)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
