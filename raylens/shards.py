"""What a row is, and what the bytes of a shard are: simulated columns into Parquet and back.

A shard holds rows [k S, (k + 1) S) in order. Its metadata tell how it was made (the simulation in
full), by which kind of processor, and the statistics of its columns, all under a checksum of their
own, so that a shard can be told sound without anything beside it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import reduce
from operator import add
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylens import storage
from raylens.config import SIMULATOR_VERSION, Simulation

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
    "subhalo_theta_E": (pa.float64(), "arcsec", "summed Einstein radius of the subhaloes"),
}
CATALOGUE: dict[str, tuple[str, str]] = {
    "subhalos_x": ("arcsec", "position of each subhalo, in the order in which they were drawn"),
    "subhalos_y": ("arcsec", "position of each subhalo"),
    "subhalos_mass": ("Msun", "mass of each subhalo"),
    "subhalos_theta_E": ("arcsec", "Einstein radius of each subhalo"),
}

# How far the same row may differ between kinds of processor: the width of their vectors and their
# approximate roots change the last bits. Pixels of normalised images lie in [0, 1].
PIXEL_TOLERANCE = 1e-4
TRUTH_TOLERANCE = 1e-6  # relative; that of single precision, in which alpha is stored


class DamagedShardError(ValueError):
    """These are not the bytes that were written; the message says by which sign."""


class ForeignShardError(ValueError):
    """The bytes are whole, but another simulation or another schema made them; the message says which difference."""


@dataclass(frozen=True)
class Statistics:
    """The values of one column, summed up so that parts can be added to a whole."""

    num: int
    mean: float
    squares: float  # sum of squared deviations from the mean
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> Self:
        """Return the statistics of an array of numbers, of any shape but an empty one."""
        values = values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float64)
        low, high = float(values.min()), float(values.max())
        # Rounding may put the mean of equal values beside them, and they would seem to vary.
        mean = min(max(float(values.mean(dtype=np.float64)), low), high)
        # Not by np.dot, whose last bits, which a shard holds, depend on the number of BLAS's threads.
        squares = float(np.square(values - values.dtype.type(mean)).sum(dtype=np.float64))
        return cls(values.size, mean, squares, low, high)

    @property
    def sd(self) -> float:
        """The standard deviation of the values."""
        return float(np.sqrt(self.squares / self.num))

    def __add__(self, other: Statistics) -> Statistics:
        """Return the statistics of both sets of values together (Chan, Golub & LeVeque 1983)."""
        num, apart = self.num + other.num, other.mean - self.mean
        return Statistics(
            num=num,
            mean=self.mean + apart * other.num / num,
            squares=self.squares + other.squares + apart**2 * self.num * other.num / num,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
        )


@dataclass(frozen=True)
class Provenance:
    """How a shard was made, and what it holds; in the metadata of its file."""

    made_from: dict[str, Any]  # simulator_version, split, simulation, columns
    processor: str  # the kind that rendered it: last bits differ between them
    pyarrow: str  # version of what wrote the file
    statistics: dict[str, Statistics]  # of each column; of all its values, where it holds lists


def schema(simulation: Simulation) -> pa.Schema:
    """Return the columns of a dataset, each with its unit and meaning."""

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
    if not isinstance(simulation.source.sigma, float):
        # A row says all that its image shows and the simulation does not.
        fields.append(field("source_sigma", pa.float64(), "arcsec", "standard deviation of the source's light"))
    if simulation.output.catalogue:
        values = pa.list_(pa.field("element", pa.float64(), nullable=False))
        fields += [field(name, values, *about) for name, about in CATALOGUE.items()]
    return pa.schema(fields)


def made_from(simulation: Simulation, split: str) -> dict[str, Any]:
    """Return what, beside its indices, decides a shard."""
    return {
        "simulator_version": SIMULATOR_VERSION,
        "split": split,
        "simulation": simulation.identity(),
        "columns": {
            field.name: [str(field.type), *(text.decode() for text in field.metadata.values())]
            for field in schema(simulation)
        },
    }


def to_table(columns: dict[str, np.ndarray], simulation: Simulation) -> pa.Table:
    """Return simulated columns (`simulate.simulate_block`) as an Arrow table of `schema`."""
    kinds = schema(simulation)
    arrays = []
    for field in kinds:
        values = columns[field.name]
        if field.name == "image":
            assert values.shape[-1] == field.type.list_size
            lines = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(lines, type=field.type))
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


def batches(tables: Iterator[pa.Table]) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Turn tables into (images, the other columns), for whatever trains or predicts."""
    for table in tables:
        others = {name: table[name].to_numpy() for name in table.column_names if name != "image"}
        yield images(table), others


def encode(table: pa.Table, simulation: Simulation, split: str, processor: str) -> bytes:
    """Return the bytes of a shard."""
    provenance = {
        "made_from": made_from(simulation, split),
        "processor": processor,
        "pyarrow": pa.__version__,
        "statistics": {name: astuple(values) for name, values in _statistics(table).items()},
    }
    text = json.dumps(provenance, sort_keys=True).encode()
    return _parquet(table.replace_schema_metadata({"raylens": text, "raylens.crc32": str(zlib.crc32(text))}))


def provenance(content: bytes) -> Provenance:
    """Return how a shard was made.

    Raises
    ------
    DamagedShardError
        If it cannot be read, or its metadata are not what their checksum says.
    ForeignShardError
        If its metadata do not say how it was made.
    """
    try:
        return _provenance(pq.read_schema(pa.BufferReader(content)).metadata)
    except (pa.ArrowException, OSError) as error:
        raise DamagedShardError(f"it cannot be read: {error}") from None


def decode(content: bytes, simulation: Simulation, split: str, rows: range) -> pa.Table:
    """Return the table of a shard, once all of it has been checked.

    Raises
    ------
    DamagedShardError
        If these are not the bytes of a shard of these rows.
    ForeignShardError
        If they are those of another simulation, split or schema.
    """
    try:
        table = open_parquet(pa.BufferReader(content)).read()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DamagedShardError(f"it cannot be read: {error}") from None
    made = _provenance(table.schema.metadata)
    wanted = made_from(simulation, split)
    if made.made_from != wanted:
        raise ForeignShardError(difference(made.made_from, wanted))
    if not table.schema.remove_metadata().equals(schema(simulation), check_metadata=True):
        raise DamagedShardError("its columns are not those that its metadata name")
    if not np.array_equal(table["index"].to_numpy(), rows):
        raise DamagedShardError(f"it does not hold the rows {rows.start} to {rows.stop - 1}")
    # No checksum covers the headers and the footer, but the same pyarrow writes the same bytes again.
    if made.pyarrow == pa.__version__ and _parquet(table) != content:
        raise DamagedShardError("its bytes are not what is written of such a table")
    return table


def agree(one: pa.Table, other: pa.Table) -> bool:
    """Return whether two tables hold the same rows, to the last bits in which kinds of processor differ."""
    if one.column_names != other.column_names or len(one) != len(other):
        return False
    if not np.allclose(images(one), images(other), rtol=0, atol=PIXEL_TOLERANCE * _brightest(images(other))):
        return False
    for name in one.column_names:
        if name == "image":
            continue
        values, others = (table[name].combine_chunks() for table in (one, other))
        if name in CATALOGUE:
            if not values.value_lengths().equals(others.value_lengths()):
                return False
            values, others = values.flatten(), others.flatten()
        if not np.allclose(values.to_numpy(), others.to_numpy(), rtol=TRUTH_TOLERANCE, atol=TRUTH_TOLERANCE):
            return False
    return True


def read(uri: str, columns: list[str]) -> pa.Table:
    """Return columns of the shard at a URI.

    Raises
    ------
    OSError
        If it cannot be read, or a page of them is not what its checksum says.
    ValueError
        If it has no such columns.
    """
    file_system, path = storage.arrow_file_system(uri)
    try:
        table = open_parquet(path, filesystem=file_system, pre_buffer=True).read(columns=columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason, folder = " ".join(str(error).split()).rstrip("."), uri.rpartition("/")[0]
        raise OSError(f"{uri} cannot be read: {reason}. `raylens verify {folder}` checks every shard.") from error
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{uri} has no column {missing[0]}, so another version of raylens wrote it; simulate the dataset anew."
        )
    return table


def require_proportion(num_bytes: int, stored: int) -> None:
    """Refuse a few bytes that would become many in memory, which images do not: their noise cannot be compressed.

    Raises
    ------
    ValueError
        If they would become more than a hundred times as many.
    """
    if num_bytes > 100 * stored:
        raise ValueError(f"its {stored:,} bytes would take {num_bytes:,} in memory, more than images can")


def open_parquet(source: Any, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file whose pages are checked as they are read, and which is no bomb."""
    file = pq.ParquetFile(source, page_checksum_verification=True, **options)
    metadata = file.metadata
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    require_proportion(
        8 * sum(chunk.num_values for chunk in chunks), sum(chunk.total_compressed_size for chunk in chunks)
    )
    return file


def difference(there: Any, here: Any, where: str = "") -> str:
    """Return the first difference between two nested dictionaries, as one clause."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            if key not in there or key not in here:
                return f"{where}{key} is only {'there' if key in there else 'here'}"
            if there[key] != here[key]:
                return difference(there[key], here[key], f"{where}{key}.")
    return f"{where.removesuffix('.')} is {json.dumps(there)} there and {json.dumps(here)} here"


def _statistics(table: pa.Table) -> dict[str, Statistics]:
    def statistics(name: str) -> Statistics:
        if name == "image":
            pixels = images(table)
            blocks = (pixels[first : first + 32] for first in range(0, len(pixels), 32))  # in the processor's cache
            return reduce(add, map(Statistics.of, blocks))
        column = table[name].combine_chunks()
        return Statistics.of((column.flatten() if name in CATALOGUE else column).to_numpy())

    return {name: statistics(name) for name in table.column_names}


def _provenance(metadata: dict[bytes, bytes] | None) -> Provenance:
    text = (metadata or {}).get(b"raylens", b"")
    if not (metadata or {}).keys() & {b"raylens", b"raylens.crc32"}:
        raise ForeignShardError("raylens did not write it")
    if (metadata or {}).get(b"raylens.crc32") != str(zlib.crc32(text)).encode():
        raise DamagedShardError("its metadata are not what their checksum says")
    try:
        values = json.loads(text)
        statistics = {name: Statistics(*of) for name, of in values["statistics"].items()}
        return Provenance(values["made_from"], values["processor"], values["pyarrow"], statistics)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ForeignShardError("its metadata are not as this version writes them") from None


def _brightest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def _parquet(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    # Noise does not compress. The checksum of each page finds a flipped bit before there is a manifest.
    pq.write_table(
        table, buffer, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True,
        row_group_size=max(len(table), 1), write_batch_size=1 << 16,
    )  # fmt: skip
    return buffer.getvalue().to_pybytes()
