"""What a dataset says of itself: its card, README.md, and the contact sheet that the card shows.

The card is Markdown with the front matter that dataset hubs read; what it says of every dataset is
`card.md`. It is a function of the dataset alone, with no date and no place in it, so that whoever
makes the dataset again gets the same card.
"""

from __future__ import annotations

import io
import json
import math
from importlib.resources import files
from string import Template

import numpy as np
import pyarrow as pa

from raylens import dataset, shards, storage
from raylens.config import SPLITS, Simulation
from raylens.dataset import Entry, Plan

NUM_SHOWN = 32  # images on a contact sheet
_NUM_ACROSS = 8
_PANEL, _LABEL, _GAP, _CAPTION = 120, 20, 6, 24  # parts of a contact sheet [pixels]

# How hubs name the size of a dataset, by the number that its rows do not reach.
_SIZE_CATEGORIES = {
    1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M", 1e8: "10M<n<100M",
    1e9: "100M<n<1B",
}  # fmt: skip

_CATALOGUE = """
The columns `subhalos_*` are lists; as a table with a line for each subhalo:

```python
import polars

columns = ["subhalos_x", "subhalos_y", "subhalos_mass", "subhalos_theta_E"]
subhalos = polars.read_parquet("part-*.parquet", columns=["index", *columns]).explode(columns)
```
"""


def write(
    uri: str, plan: Plan, entries: list[Entry], statistics: dict[str, shards.Statistics], processors: set[str]
) -> None:
    """Write the card and the contact sheet of a dataset whose shards stand."""
    first = shards.read(dataset.shard_uri(uri, 0), ["image", "num_subhalos", "alpha"]).slice(0, NUM_SHOWN)
    sheet = contact_sheet(shards.images(first), first["num_subhalos"].to_numpy(), first["alpha"].to_numpy())
    storage.write(storage.join(uri, "contact-sheet.png"), sheet)
    storage.write(storage.join(uri, "README.md"), card(plan, entries, statistics, processors))


def card(plan: Plan, entries: list[Entry], statistics: dict[str, shards.Statistics], processors: set[str]) -> str:
    """Return the card of a dataset: what it holds, how it is read and how it was made."""
    camera = plan.simulation.camera
    text = Template(files("raylens").joinpath("card.md").read_text(encoding="utf-8"))
    return text.substitute(
        recipe=plan.recipe,
        split=plan.split,
        digest=plan.digest,
        # Hubs know no other splits: the test sets with alpha held are test sets.
        hub_split=plan.split.partition("-")[0],
        size_category=next((name for limit, name in _SIZE_CATEGORIES.items() if plan.num_images < limit), "n>1B"),
        num_images=_count(plan.num_images, "simulated image"),
        num_files=_count(len(entries), "Parquet file"),
        num_shown=min(NUM_SHOWN, plan.num_images),
        num_rows=plan.num_images,
        rows=f"{plan.num_images:,}",
        megabytes=f"{sum(entry.bytes for entry in entries) / 1e6:,.1f}",
        contents=_contents(plan),
        columns=_columns(plan.simulation, statistics),
        n=camera.num_pixels,
        pixel_scale=f"{camera.pixel_scale:g}",
        catalogue=_CATALOGUE if plan.simulation.output.catalogue else "",
        shard_size=plan.shard_size,
        simulator_version=plan.simulator_version,
        raylens=plan.versions["raylens"],
        versions=", ".join(f"{name} {version}" for name, version in plan.versions.items()),
        processors=", ".join(sorted(processors)),
        simulation=json.dumps({"name": plan.recipe, "simulation": plan.simulation.as_dict()}, indent=1),
    )


def contact_sheet(images: np.ndarray, num_subhalos: np.ndarray, alpha: np.ndarray) -> bytes:
    """Return a PNG of images (rows, n, n), eight to a line, each from its lowest to its highest value."""
    # Imported here: every worker that simulates imports this module, and none of them draws.
    import matplotlib.style
    from matplotlib.figure import Figure
    from PIL import Image

    width = _NUM_ACROSS * (_PANEL + _GAP) + _GAP
    height = _GAP + math.ceil(len(images) / _NUM_ACROSS) * (_PANEL + _LABEL) + _CAPTION
    with matplotlib.style.context("default"):  # and not the user's own: the same rows, the same bytes
        figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        for place, (image, number, slope) in enumerate(zip(_shrunk(images), num_subhalos, alpha, strict=True)):
            line, across = divmod(place, _NUM_ACROSS)
            left, bottom = _GAP + across * (_PANEL + _GAP), height - _GAP - _PANEL - line * (_PANEL + _LABEL)
            extent = (left, left + _PANEL, bottom, bottom + _PANEL)
            axes.imshow(image, extent=extent, origin="lower", cmap="inferno", interpolation="nearest")
            label = f"N {number}   α {slope:.2f}".replace("-", "−")
            axes.text(left + _PANEL / 2, bottom - _LABEL / 2, label, size=8, ha="center", va="center")
        caption = (
            "N: number of subhaloes.  α: slope of their mass function.  "
            "Each image from its lowest value (dark) to its highest (bright); x to the right, y upwards."
        )
        axes.text(_GAP, _CAPTION / 2, caption, size=7.5, va="center", color="#555555")
        axes.set(xlim=(0, width), ylim=(0, height), aspect="auto")
        axes.set_axis_off()
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
    # Of 256 colours it weighs half as much, and Pillow writes no date.
    sheet = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(sheet, format="png", optimize=True)
    return sheet.getvalue()


def _shrunk(images: np.ndarray) -> np.ndarray:
    """Return images of at most 80 x 80 pixels, by means over squares; what is shown would else weigh megabytes."""
    step = math.ceil(images.shape[-1] / 80)
    missing = -images.shape[-1] % step
    images = np.pad(images, ((0, 0), (0, missing), (0, missing)), mode="edge")
    n = images.shape[-1] // step
    return images.reshape(-1, n, step, n, step).mean(axis=(2, 4))


def _contents(plan: Plan) -> str:
    """Return what an image shows, in sentences."""
    camera, population, held = plan.simulation.camera, plan.simulation.subhalos, SPLITS[plan.split]
    side, low, high = camera.num_pixels, population.mass_min, population.mass_max
    source = plan.simulation.source
    galaxy = "a round Gaussian galaxy" + (f", cut at {source.cut:g} arcsec" if source.cut else "")
    masses = f"follow dN/dM proportional to M^alpha from {low:.3g} to {high:.3g} Msun"
    if population.mass_function == "decades":
        masses = f"are {low:.3g} Msun and its tenfolds up to {high:.3g} Msun, the k-th in proportion to k^alpha"
    share = f"make up {population.mass_fraction:g} of the mass of the lens"
    if population.mass_total is not None:
        share = f"reach {population.mass_total:.3g} Msun"
    sentences = [
        f"An image shows {side} x {side} pixels of {camera.pixel_scale:g} arcsec: {galaxy}, lensed by a "
        "singular isothermal ellipsoid and N subhaloes, which are singular isothermal spheres.",
        f"Their masses {masses}; they are drawn until they {share}. "
        f"Distances are those of {plan.simulation.cosmology}.",
    ]
    if population.h != 1 or population.z_lens is not None:
        place = "the lens" if population.z_lens is None else f"a lens of redshift {population.z_lens:g}"
        sentences.append(f"Their Einstein radii are those of {population.h:g} of their masses in {place}.")
    if held is not None:
        sentences.append(f"In this split alpha is held at {held}.")
    if population.compensation == "sheet":
        sentences.append("A uniform disc of negative convergence takes the mass of the subhaloes away again.")
    if camera.psf_sigma:
        sentences.append(f"The point-spread function is a Gaussian of sigma {camera.psf_sigma:g} arcsec.")
    if camera.signal_to_noise is None:
        sentences.append("There is no noise.")
    else:
        signal = "summed over the frame" if camera.noise_reference == "frame" else "of the brightest pixel"
        sentences.append(f"Gaussian noise leaves a signal-to-noise ratio of {camera.signal_to_noise:g} {signal}.")
    scaled = "is scaled to run from 0 to 1" if camera.normalise else "is in units of the source's central brightness"
    if camera.bits is not None:
        scaled += f", in {2**camera.bits:,} steps"
    return "\n".join([*sentences, f"Each image {scaled}."])


def _columns(simulation: Simulation, statistics: dict[str, shards.Statistics]) -> str:
    """Return a line for each column: type, unit, meaning and statistics."""
    lines = []
    for field in shards.schema(simulation):
        values, whole = statistics[field.name], pa.types.is_integer(field.type)
        ends = (f"{end:,.0f}" if whole else f"{end:.4g}" for end in (values.low, values.high))
        about = (field.metadata[key].decode() for key in (b"unit", b"description"))
        cells = [f"`{field.name}`", _type(field.type), *about, *ends, f"{values.mean:.4g}", f"{values.sd:.4g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _type(kind: pa.DataType) -> str:
    if pa.types.is_fixed_size_list(kind):
        return f"{_type(kind.value_type.value_type)} [{kind.list_size}, {kind.value_type.list_size}]"
    if pa.types.is_list(kind):
        return f"list of {_type(kind.value_type)}"
    return np.dtype(kind.to_pandas_dtype()).name


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
