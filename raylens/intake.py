"""What is given to be predicted: FITS, NumPy and Parquet files into images as a network was trained on.

What is no image, or none for this network, becomes the reason why, in plain words. Nothing is
unpickled. Raylens's own files say their pixel scale and whether they are normalised; of others a
FITS file may say the former.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from astropy import units
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from raylens import image, models, shards, storage
from raylens.config import Camera, Simulation
from raylens.dataset import Dataset

_NUM_AT_ONCE = 512  # images


@dataclass(frozen=True)
class Stack:
    """Images of one size and scale."""

    pixels: np.ndarray  # (images, rows, columns), real numbers of any kind
    pixel_scale: float | None = None  # [arcsec]; None: not stated
    normalised: bool | None = None  # None: not known


class File(NamedTuple):
    """A file of images; a dataset's shard, of which some rows are used, if it has a camera."""

    uri: str
    name: str
    camera: Camera | None = None
    num_rows: int | None = None


class Found(NamedTuple):
    """Files of images in their order, and the dataset that they are, if they are one."""

    files: list[File]
    num_ignored: int  # other files
    data: Dataset | None


def find(uri: str) -> Found:
    """Return the files of the dataset, in the folder or at the place of the one file that a URI names.

    Raises
    ------
    ValueError
        If there is no such file or folder, none that could hold images, or an unfinished dataset.
    """
    name = uri.rpartition("/")[2]
    if storage.exists(storage.join(uri, "dataset.json")):
        data = Dataset.open(uri)
        camera = data.plan.simulation.camera
        return Found([File(part, part.rpartition("/")[2], camera, num_rows) for part, num_rows in data.parts], 0, data)
    if _kind(name):
        if not storage.exists(uri):
            raise ValueError(f"{uri}: there is no such file.")
        return Found([File(uri, name)], 0, None)
    standing = storage.names(uri)
    names = sorted(name for name in standing if _kind(name) and not name.startswith("."))
    if not names:
        there = "files of other kinds only" if standing else "no such folder, or nothing in it"
        raise ValueError(f"{uri} holds no images: {there}; give a dataset, or files ending in {', '.join(_READERS)}.")
    return Found([File(storage.join(uri, name), name) for name in names], len(standing) - len(names), None)


class Given(NamedTuple):
    """An image as a network takes it, or the reason why it cannot be predicted."""

    image: np.ndarray | str  # float32 (num_pixels, num_pixels)
    states_scale: bool = False  # whether it came with a pixel scale


def images(file: File, card: models.Card) -> Iterator[Given]:
    """Yield the images of a file in their order.

    Raises
    ------
    OSError
        If the file cannot be read from its place, or is a damaged shard of a dataset.
    """
    if file.camera is None:
        stacks = read(file.name, storage.read(file.uri))
    else:
        pixels = shards.images(shards.read(file.uri, ["image"])[: file.num_rows])
        stacks = iter([Stack(pixels, file.camera.pixel_scale, file.camera.normalise)])
    for stack in stacks:
        yield from [Given(stack)] if isinstance(stack, str) else prepare(stack, card)


def read(name: str, content: bytes) -> Iterator[Stack | str]:
    """Yield the images of a file in their order, and a reason for each that cannot be read.

    A file that breaks off ends with a reason; one without any image is a reason alone.
    """
    kind = _kind(name)
    assert kind is not None
    num_found = 0
    try:
        for found in _READERS[kind](content):
            yield found
            num_found += 1
    except Exception as error:  # a file that is not what its name says fails in any way
        yield f"{'from here on ' if num_found else ''}it cannot be read as {_NAMES[kind]}: {_first_sentence(error)}"
        return
    if not num_found:
        yield "it holds no image"


def prepare(stack: Stack, card: models.Card) -> Iterator[Given]:
    """Yield each image of a stack as a network takes it: checked, and normalised as in training."""
    states_scale = stack.pixel_scale is not None
    try:
        rows, columns = stack.pixels.shape[1:]
        models.require_fit(card, shape=(rows, columns), pixel_scale=stack.pixel_scale, normalised=stack.normalised)
    except ValueError as error:
        yield from [Given(str(error), states_scale)] * len(stack.pixels)
        return
    for first in range(0, len(stack.pixels), _NUM_AT_ONCE):
        pixels = stack.pixels[first : first + _NUM_AT_ONCE]
        # Counts on a bright background would lose their last digits in single precision.
        pixels = pixels.astype(np.float32 if pixels.dtype.kind == "f" and pixels.itemsize <= 4 else np.float64)
        with np.errstate(all="ignore"):  # what is not finite is told below
            spans = pixels.max(axis=(1, 2)) - pixels.min(axis=(1, 2))
            normal = image.normalise(pixels) if card.normalised else pixels
            normal = normal.astype(np.float32)
        for one, span in zip(normal, spans, strict=True):
            if not np.isfinite(span):
                yield Given("it holds pixels that are not finite numbers", states_scale)
            elif span == 0:
                yield Given("all its pixels are equal", states_scale)
            else:
                yield Given(one, states_scale)


def _kind(name: str) -> str | None:
    return next((suffix for suffix in _READERS if name.lower().endswith(suffix)), None)


def _fits(content: bytes) -> list[Stack | str]:
    """Return the images of every extension that holds an array."""
    found: list[Stack | str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong with a file is told where an image is missing
        with fits.open(io.BytesIO(content), memmap=False) as hdus:
            normalised = _said_by_raylens(hdus)
            for hdu in hdus:
                if hdu.is_image and hdu.header["NAXIS"]:
                    found.append(_of_extension(hdu, hdus, normalised, len(content)))
            last = hdus.fileinfo(len(hdus) - 1)
            rest = content[last["datLoc"] + last["datSpan"] :]
    if rest.strip(b"\0 "):
        found.append("from here on the file is damaged")
    return found


def _of_extension(hdu: Any, hdus: fits.HDUList, normalised: bool | None, num_bytes: int) -> Stack | str:
    try:
        shards.require_proportion(hdu.size, num_bytes)
        pixels, scales = _stacked(hdu.data), _pixel_scales(hdu.header, hdus)
    except Exception as error:  # as above; the next extension may be sound
        return f"it cannot be read: {_first_sentence(error)}"
    if scales is None:
        return Stack(pixels, None, normalised)
    if not math.isclose(*scales, rel_tol=models.PIXEL_SCALE_TOLERANCE):
        return f"its pixels are not square: {scales[0]:g} x {scales[1]:g} arcsec"
    return Stack(pixels, math.sqrt(scales[0] * scales[1]), normalised)


def _said_by_raylens(hdus: fits.HDUList) -> bool | None:
    """Return whether the images are normalised, if `raylens export` wrote the file."""
    if "SIMULATION" not in hdus:
        return None
    return Simulation.parse(json.loads(hdus["SIMULATION"].data["JSON"][0])).camera.normalise


def _pixel_scales(header: fits.Header, hdus: fits.HDUList) -> tuple[float, float] | None:
    """Return the sides of a pixel that a header states [arcsec]; None where it states none, or in no angle."""
    if not any(re.fullmatch(r"CDELT[12]|CD[12]_[12]", keyword) for keyword in header):
        return None
    wcs = WCS(header, fobj=hdus, naxis=2)
    first, second = wcs.wcs.cunit
    if not (first.is_equivalent(units.arcsec) and second.is_equivalent(units.arcsec)):
        return None
    along_x, along_y = proj_plane_pixel_scales(wcs)
    return float(along_x * first.to(units.arcsec)), float(along_y * second.to(units.arcsec))


def _unzipped(content: bytes) -> bytes:
    with gzip.open(io.BytesIO(content)) as file:
        unzipped = file.read(101 * len(content))
    shards.require_proportion(len(unzipped), len(content))
    return unzipped


def _npy(content: bytes) -> list[Stack | str]:
    array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"it holds values of type {array.dtype}, not real numbers")
    return [Stack(_stacked(array))]


def _stacked(array: np.ndarray) -> np.ndarray:
    """Return one image, or several, as (images, rows, columns)."""
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"it holds an array of shape {array.shape}, and not (n, n) or (images, n, n)")
    return array[None] if array.ndim == 2 else array


def _parquet(content: bytes) -> Iterator[Stack | str]:
    file = shards.open_parquet(pa.BufferReader(content))
    if "image" not in file.schema_arrow.names:
        raise ValueError("it has no column image")
    kind = file.schema_arrow.field("image").type
    value = kind.value_type.value_type if _holds_lists(kind) and _holds_lists(kind.value_type) else kind
    if not (pa.types.is_integer(value) or pa.types.is_floating(value)):
        raise ValueError(f"its column image holds {kind}, not lists of lists of numbers")
    try:
        camera = shards.provenance(content).made_from["simulation"]["camera"]
        said = camera["pixel_scale"], camera["normalise"]
    except shards.ForeignShardError:
        said = None, None
    for batch in file.iter_batches(_NUM_AT_ONCE, columns=["image"]):
        for row in batch.column(0):
            pixels = _of_row(row)
            yield pixels if isinstance(pixels, str) else Stack(pixels[None], *said)


def _holds_lists(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _of_row(row: pa.Scalar) -> np.ndarray | str:
    """Return the pixels of an image (rows, columns) that is lists of lists."""
    if not row.is_valid or not len(row.values) or row.values.null_count:
        return "it has no pixels"
    lengths = pc.list_value_length(row.values).to_numpy()
    if lengths.min() != lengths.max():
        return "its rows differ in length"
    if not lengths.max():
        return "it has no pixels"
    # A null among the pixels becomes nan.
    return row.values.flatten().to_numpy(zero_copy_only=False).reshape(len(lengths), -1)


def _first_sentence(error: Exception) -> str:
    """Return what an error of another library says first; what follows is advice for its callers."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0].rstrip(".:")


_READERS: dict[str, Callable[[bytes], Iterable[Stack | str]]] = {
    ".fits": _fits,
    ".fits.gz": lambda content: _fits(_unzipped(content)),
    ".npy": _npy,
    ".parquet": _parquet,
}
_NAMES = {".fits": "FITS", ".fits.gz": "FITS", ".npy": "a NumPy array", ".parquet": "Parquet"}
