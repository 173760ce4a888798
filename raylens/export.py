"""A range of a dataset's images to one FITS file, with coordinates and the truth in each header.

Primary header: what made the dataset. `SIMULATION`: a table of one row, the simulation in full as JSON.
`SUBHALOS`, with output.catalogue: a table of the subhaloes of all images, told apart by INDEX.
`IMAGE`, EXTVER 1, 2, ...: the images, in the order of their indices.

The coordinates are linear offsets from the centre of the frame [arcsec], not a celestial projection
such as TAN: these lenses have no place on the sky, x grows to the right where right ascension grows
to the left, and phi is counted from x, not from north. FITS counts pixels from 1 and its first axis
is x, so a reader sees image[row, column] as the dataset has it, and y upwards.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy.io import fits

from raylens import shards, storage
from raylens.config import Camera, Simulation
from raylens.dataset import Dataset, Plan, shard_uri

# The file is made in memory, and a reader walks through one header for each image: more is for Parquet.
MAX_BYTES = 1 << 30

# Keyword in an image's header: the column that it holds, and what is said of it there.
TRUTH = {
    "INDEX": ("index", "row of the dataset"),
    "NSUBHALO": ("num_subhalos", "number of subhaloes"),
    "ALPHA": ("alpha", "slope of the subhalo mass function"),
    "THETA_E": ("theta_E", "Einstein radius, intermediate axis"),
    "Q": ("q", "minor over major axis of the lens mass"),
    "PHI": ("phi", "from x to major axis, anticlockwise"),
    "X_LENS": ("x", "x of the lens centre"),
    "Y_LENS": ("y", "y of the lens centre"),
    "Z_LENS": ("z_lens", "redshift of the lens"),
    "Z_SOURCE": ("z_source", "redshift of the source"),
    "SIGMA_V": ("sigma_v", "velocity dispersion of the lens"),
    "LENSMASS": ("lens_mass", "mass of the lens"),
    "SUBMASS": ("subhalo_mass", "summed mass of subhaloes"),
    "SUBTHETA": ("subhalo_theta_E", "summed Einstein radius of subhaloes"),
}
# The same, where it varies from image to image.
VARYING = {"SIGMA_S": ("source_sigma", "standard deviation of the light")}
# Column of the table of subhaloes: the dataset's column.
CATALOGUE = {"X": "subhalos_x", "Y": "subhalos_y", "MASS": "subhalos_mass", "THETA_E": "subhalos_theta_E"}
FITS_UNITS = {"1": "", "Msun": "solMass"}  # the others are FITS's own

_BLOCK = 2880  # bytes; each header and each array fills whole ones


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what that cost."""

    fits: str  # URI
    num_images: int
    bytes: int
    seconds: float
    images_per_second: float


def export(uri: str, to: str, *, index: str) -> Exported:
    """Write the images of a range of the dataset at a URI into one FITS file.

    The same range of the same dataset gives the same bytes, wherever it stands and however many
    images it has been extended by.

    Raises
    ------
    ValueError
        If there is no complete dataset, `index` is no range of it (`indices`) or more than one file
        takes (MAX_BYTES), or `to` does not end in .fits.
    OSError
        If a shard is damaged, or a place cannot be read or written.
    """
    started = time.perf_counter()
    to = storage.absolute(to)
    if not to.endswith(".fits"):
        raise ValueError(f"the file to write must end in .fits; got {to}.")
    data = Dataset.open(uri)
    rows = indices(index, data.num_images)
    _require_room(data, rows)
    file = io.BytesIO()
    fits.HDUList([_primary(data.plan, rows), *_tables(data, rows)]).writeto(file)
    file.writelines(_image_hdus(data, rows))
    content = file.getvalue()
    storage.write(to, content)
    seconds = time.perf_counter() - started
    return Exported(
        fits=to,
        num_images=len(rows),
        bytes=len(content),
        seconds=seconds,
        images_per_second=len(rows) / seconds,
    )


def indices(text: str, num_images: int) -> range:
    """Return the indices that A:B means (B is not among them), A:, :B, or A alone for that one image.

    >>> indices("100:", 128)
    range(100, 128)
    >>> indices("16", 128)
    range(16, 17)

    Raises
    ------
    ValueError
        If it is no range, holds nothing, or reaches beyond the dataset.
    """
    held = f"the dataset holds 0:{num_images}"
    found = re.fullmatch(r"(\d+)|(\d*):(\d*)", text, re.ASCII)
    if found is None:
        raise ValueError(f"--index takes a range A:B, from A up to but not with B, or one index; got {text} ({held}).")
    alone, first, end = found.groups()
    rows = range(int(alone), int(alone) + 1) if alone else range(int(first or 0), int(end or num_images))
    if max(rows.start + 1, rows.stop) > num_images:
        raise ValueError(f"--index {text} reaches beyond the dataset; {held}.")
    if not rows:
        raise ValueError(f"--index {text} holds no image: in A:B, A must be below B ({held}).")
    return rows


def _require_room(data: Dataset, rows: range) -> None:
    """Refuse a range whose file would be larger than MAX_BYTES, and say how much of it fits."""
    header = next(_image_hdus(data, rows[:1]))  # those of the others are as long
    num_bytes = np.full(len(rows), len(header) + 4 * data.num_pixels**2 + _BLOCK)  # pixels are filled to a block
    num_bytes[0] += 5 * _BLOCK  # the primary header and the tables, but for the subhaloes
    if data.plan.simulation.output.catalogue:
        counts = [table["num_subhalos"].to_numpy() for table in _read(data, rows, ["num_subhalos"])]
        num_bytes += np.concatenate(counts) * 8 * (1 + len(CATALOGUE))
    num_fitting = int(np.searchsorted(np.cumsum(num_bytes), MAX_BYTES, side="right"))
    if num_fitting < len(rows):
        raise ValueError(
            f"--index {rows.start}:{rows.stop} holds {len(rows):,} images, and one file takes {num_fitting:,} of them "
            f"({MAX_BYTES / 1e6:,.0f} MB); export {rows.start}:{rows.start + num_fitting} and so on."
        )


def _primary(plan: Plan, rows: range) -> fits.PrimaryHDU:
    """Return the header that says what made the dataset, without its place or its present size."""
    hdu = fits.PrimaryHDU()
    hdu.header.update(
        {
            "RECIPE": (plan.recipe, "what was simulated"),
            "SPLIT": (plan.split, "of the dataset"),
            "DIGEST": (plan.digest, "of the simulation and SIMVERS"),
            "SIMVERS": (plan.simulator_version, "version of the simulator"),
            "RAYLENS": (plan.versions.get("raylens", ""), "version that began the dataset"),
            "SEED": (plan.simulation.seed, "of all random numbers, with SPLIT and INDEX"),
            "NIMAGES": (len(rows), "images in this file, IMAGE 1 to NIMAGES"),
        }
    )
    return hdu


def _tables(data: Dataset, rows: range) -> list[fits.BinTableHDU]:
    simulation = data.plan.simulation
    text = json.dumps(simulation.as_dict(), sort_keys=True)
    columns = [fits.Column("JSON", f"{len(text)}A", array=np.array([text]))]
    tables = [fits.BinTableHDU.from_columns(columns, name="SIMULATION")]
    if simulation.output.catalogue:
        tables.append(_catalogue(data, rows))
    return tables


def _catalogue(data: Dataset, rows: range) -> fits.BinTableHDU:
    """Return the subhaloes of all images in the order in which they were drawn, each with the INDEX of its image."""
    table = pa.concat_tables(_read(data, rows, ["index", *CATALOGUE.values()]))
    num_subhalos = pc.list_value_length(table[CATALOGUE["X"]]).to_numpy()
    columns = [fits.Column("INDEX", "K", array=np.repeat(table["index"].to_numpy(), num_subhalos))]
    for name, column in CATALOGUE.items():
        unit = _fits_unit(shards.CATALOGUE[column][0])
        columns.append(fits.Column(name, "D", unit=unit, array=pc.list_flatten(table[column]).to_numpy()))
    return fits.BinTableHDU.from_columns(columns, name="SUBHALOS")


def _image_hdus(data: Dataset, rows: range) -> Iterator[bytes]:
    """Yield the header and the pixels of each image.

    By hand, because of the truth: astropy cuts numbers to 20 characters, and takes seventy times as long.
    """
    same, schema = _common_cards(data.plan.simulation), shards.schema(data.plan.simulation)
    told = TRUTH | {keyword: about for keyword, about in VARYING.items() if about[0] in schema.names}
    columns = [column for column, _ in told.values()]
    comments = [_comment(schema.field(column), meaning) for column, meaning in told.values()]
    number = 0
    for table in _read(data, rows, ["image", *columns]):
        truth = zip(*(table[column].to_pylist() for column in columns), strict=True)
        for image, values in zip(shards.images(table), truth, strict=True):
            number += 1
            cards = [
                _card("EXTVER", number, "from 1 in this file; INDEX is the row"),
                *map(_card, told, values, comments),
            ]
            yield _filled(f"{same}{''.join(cards)}END".encode("ascii"), b" ")
            yield _filled(image.astype(">f4").tobytes(), b"\0")


def _common_cards(simulation: Simulation) -> str:
    """Return the cards in which the images of a simulation do not differ."""
    n = simulation.camera.num_pixels
    normalised = "scaled to minimum 0 and maximum 1"
    unit = normalised if simulation.camera.normalise else "central brightness of the source is 1"
    return "".join(
        [
            _card("XTENSION", "IMAGE", ""),
            _card("BITPIX", -32, "single precision"),
            _card("NAXIS", 2, ""),
            _card("NAXIS1", n, "columns"),
            _card("NAXIS2", n, "rows"),
            _card("PCOUNT", 0, ""),
            _card("GCOUNT", 1, ""),
            _card("EXTNAME", "IMAGE", ""),
            _card("BUNIT", "", unit),
            _coordinates(simulation.camera),
        ]
    )


def _coordinates(camera: Camera) -> str:
    """Return the cards of an image's linear coordinates [arcsec]: x along FITS's first axis, y along its second."""
    centre = (camera.num_pixels + 1) / 2  # FITS counts from 1, at the centre of a pixel
    cards = [_card("WCSAXES", 2, ""), _card("WCSNAME", "LENS FRAME", "offsets from the centre of the frame")]
    for axis, name in enumerate("XY", start=1):
        cards += [
            _card(f"CTYPE{axis}", name, "a linear axis"),
            _card(f"CUNIT{axis}", "arcsec", ""),
            _card(f"CRPIX{axis}", centre, "centre of the frame"),
            _card(f"CRVAL{axis}", 0.0, "[arcsec]"),
            _card(f"CDELT{axis}", camera.pixel_scale, "[arcsec] pixel scale"),
        ]
    return "".join(cards)


def _card(keyword: str, value: str | int | float, comment: str) -> str:
    """Return the 80 characters of a card; a float in the digits that give it back, to the last bit."""
    if isinstance(value, str):
        text = f"'{value:8}'".ljust(20)
    else:
        text = repr(value).upper()
        text = (text if "." in text else text.replace("E", ".0E")).rjust(20)
    card = f"{keyword:8}= {text} / {comment}" if comment else f"{keyword:8}= {text}"
    assert len(keyword) <= 8
    assert len(card) <= 80
    return card.ljust(80)


def _filled(content: bytes, filler: bytes) -> bytes:
    return content.ljust(-(-len(content) // _BLOCK) * _BLOCK, filler)


def _comment(field: pa.Field, meaning: str) -> str:
    unit = _fits_unit(field.metadata[b"unit"].decode())
    return f"[{unit}] {meaning}" if unit else meaning


def _fits_unit(unit: str) -> str:
    return FITS_UNITS.get(unit, unit)


def _read(data: Dataset, rows: range, columns: list[str]) -> Iterator[pa.Table]:
    """Yield columns of the rows of a range, a table for each shard that it touches."""
    size = data.plan.shard_size
    for number in range(rows.start // size, (rows.stop - 1) // size + 1):
        table = shards.read(shard_uri(data.uri, number), columns)
        start = max(rows.start - number * size, 0)
        yield table.slice(start, rows.stop - number * size - start)
