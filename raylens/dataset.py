"""When a dataset is complete: its plan, its shards, its manifest, and how it is verified.

A dataset is a folder: `dataset.json` (the plan, written first), `part-00000.parquet` and so on
(the shards, each written whole or not at all), `README.md`, `contact-sheet.png`,
`illustration.json`, and `manifest.json` (each shard's rows, bytes and checksum, written last: its
presence means complete). Shard k of shard size S is a function of the Simulation, the split, S and
k alone, to the last bits in which kinds of processor differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from platform import python_version
from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
from pydantic import AfterValidator, Field

from raylens import __version__, shards, storage
from raylens.config import NAME, SIMULATOR_VERSION, SPLITS, Settings, Simulation

SHARD_SIZE = 1024  # images; a shard of 60 x 60 pixels is 15 MB
MAX_SHARDS = 100_000  # beyond, their names in alphabetical order, in which many read them, are not in that of the rows


def check_split(split: str) -> str:
    """Return a split; refuse one that is none of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"{split} is no split; the splits are {', '.join(SPLITS)}.")
    return split


class Plan(Settings):
    """What a dataset is to hold; `dataset.json`."""

    recipe: Annotated[str, Field(pattern=NAME)]  # with the split, the name of a folder
    split: Annotated[str, AfterValidator(check_split)]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    simulator_version: int
    shard_size: Annotated[int, Field(ge=1, le=1_000_000)]  # of those of 60 x 60 pixels, 15 GB
    num_images: Annotated[int, Field(ge=1)]
    versions: dict[str, str]  # of the software that began it
    simulation: Simulation

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def rows(self, number: int) -> range:
        """Return the indices of the rows of a shard."""
        return range(number * self.shard_size, min((number + 1) * self.shard_size, self.num_images))


class Entry(Settings):
    """A shard as the manifest knows it."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Manifest(Settings):
    """What a complete dataset holds; `manifest.json`."""

    num_images: int
    processors: list[str]  # the kinds that rendered it: last bits differ between them
    shards: list[Entry]


@dataclass(frozen=True)
class Found:
    """A sound shard, as it stands."""

    entry: Entry
    provenance: shards.Provenance


class Dataset:
    """A complete dataset, or its first rows: its URI, plan and manifest; the plan has as many images as are used."""

    def __init__(self, uri: str, plan: Plan, manifest: Manifest) -> None:
        self.uri, self.plan, self.manifest = uri, plan, manifest

    @classmethod
    def open(cls, uri: str, num_images: int | None = None) -> Self:
        """Return the dataset at a URI, or its first rows, which are the same however many follow them.

        Raises
        ------
        ValueError
            If there is none, if it is not complete, or if it holds fewer images.
        """
        uri = storage.absolute(uri)
        plan = read_plan(uri)
        manifest = read_manifest(uri)
        if manifest is None:
            standing = len(standing_shards(uri))
            raise ValueError(
                f"{uri} has {standing} of {plan.num_shards} shards and no manifest, so simulation did not finish. "
                f"Run `{command(uri)}`; finished shards are kept."
            )
        there = [(entry.name, entry.rows) for entry in manifest.shards]
        if manifest.num_images != plan.num_images or len(there) != plan.num_shards or there != _shards_of(plan):
            raise ValueError(
                f"{uri}/manifest.json does not list the shards of the {plan.num_images:,} images of dataset.json; "
                f"`{command(uri)}` mends it."
            )
        if num_images is not None and num_images > plan.num_images:
            raise ValueError(
                f"{uri} holds {plan.num_images:,} images, and {num_images:,} are asked for; "
                f"`{command(uri)} --num-images {num_images}` makes the others."
            )
        return cls(uri, plan.override({"num_images": num_images or plan.num_images}), manifest)

    @property
    def num_images(self) -> int:
        return self.plan.num_images

    @property
    def num_pixels(self) -> int:
        return self.plan.simulation.camera.num_pixels

    @property
    def parts(self) -> list[tuple[str, int]]:
        """The URI of each shard, and how many of its rows, from the first on, are used."""
        return [(shard_uri(self.uri, number), len(self.plan.rows(number))) for number in range(self.plan.num_shards)]

    def read(self, columns: list[str]) -> dict[str, np.ndarray]:
        """Return columns of numbers of the whole dataset, without its images, in the order of the rows."""
        with ThreadPoolExecutor(8) as pool:
            table = pa.concat_tables(pool.map(lambda part: shards.read(part[0], columns)[: part[1]], self.parts))
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
    """Return the manifest of the dataset at a URI; None if it has none; ValueError if it is not what it was."""
    place = storage.join(uri, "manifest.json")
    return _parse(Manifest, place) if storage.exists(place) else None


def plan_for(
    uri: str, *, recipe: str, split: str, simulation: Simulation, num_images: int, shard_size: int | None = None
) -> Plan:
    """Return the plan of a dataset that is to stand at a URI: a new one, the one that stands, or that extended.

    Raises
    ------
    ValueError
        If a dataset of another shard size than the one asked for stands there, or of another simulation,
        or if it would have more than `MAX_SHARDS`.
    """
    plan = _plan_for(uri, recipe, split, simulation, num_images, shard_size)
    if plan.num_shards > MAX_SHARDS:
        raise ValueError(
            f"a dataset has at most {MAX_SHARDS:,} shards; {plan.num_images:,} images in shards of {plan.shard_size} "
            f"are {plan.num_shards:,}. Choose --shard-size {-(-plan.num_images // MAX_SHARDS)} or more."
        )
    return plan


def _plan_for(
    uri: str, recipe: str, split: str, simulation: Simulation, num_images: int, shard_size: int | None
) -> Plan:
    if not storage.exists(storage.join(uri, "dataset.json")):
        return Plan(
            recipe=recipe,
            split=split,
            digest=simulation.digest,
            simulator_version=SIMULATOR_VERSION,
            shard_size=shard_size or SHARD_SIZE,
            num_images=num_images,
            versions=versions(),
            simulation=simulation,
        )
    plan = read_plan(uri)
    there = {"simulator_version": plan.simulator_version, "split": plan.split, "simulation": plan.simulation.as_dict()}
    here = {"simulator_version": SIMULATOR_VERSION, "split": split, "simulation": simulation.as_dict()}
    if there != here:
        raise ValueError(
            f"{uri}/dataset.json is not that of the dataset which belongs there: {shards.difference(there, here)}. "
            "Remove that dataset, or choose another --to."
        )
    if shard_size not in (None, plan.shard_size):
        raise ValueError(
            f"{uri} has shards of {plan.shard_size} images; got --shard-size {shard_size}. "
            f"Leave it at {plan.shard_size}, or choose another --to."
        )
    return plan.override({"num_images": max(num_images, plan.num_images)})


def require_same_simulator(uri: str, plan: Plan) -> None:
    """Refuse to make a dataset again by another version of the simulator than the one that made it."""
    if plan.simulator_version != SIMULATOR_VERSION:
        raise ValueError(
            f"{uri} was made by simulator version {plan.simulator_version} (raylens {plan.versions.get('raylens')}), "
            f"and this is {SIMULATOR_VERSION} (raylens {__version__}), which makes other rows. Install that version."
        )


def begin(uri: str, plan: Plan) -> None:
    """Write the plan of a dataset that `plan_for` returned, unless it stands.

    Raises
    ------
    ValueError
        If another run has meanwhile planned otherwise; the plan that stands is only ever extended.
    """
    place, text = storage.join(uri, "dataset.json"), _json(plan.as_dict()).encode()
    while (there := _standing_plan(standing := storage.read_if_there(place))) != plan:
        if there is not None and not _extends(plan, there):
            raise ValueError(f"{uri} has just been begun otherwise by another run; run the same command again.")
        storage.remove(storage.join(uri, "manifest.json"))  # first, or it would name a dataset that is not there
        if storage.write_if(place, text, standing=standing):
            return


def command(uri: str) -> str:
    """Return the command that finishes, mends or re-makes the dataset at a URI, where it is."""
    return f"raylens simulate {uri} --to {uri.rsplit('/', 1)[0]}"


def versions() -> dict[str, str]:
    """Return the versions of the software that decides a dataset's bytes."""
    packages = ("numpy", "scipy", "numba", "llvmlite", "astropy", "lenstronomy", "pyarrow")
    return {"raylens": __version__, "python": python_version(), **{name: version(name) for name in packages}}


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"part-{number:05d}.parquet"


def standing_shards(uri: str) -> set[str]:
    """Return the names of the shards that stand, sound or not."""
    return {name for name in storage.names(uri) if re.fullmatch(r"part-\d{5}\.parquet", name)}


def shard_uri(uri: str, number: int) -> str:
    """Return the URI of a shard of the dataset at a URI."""
    return storage.join(uri, shard_name(number))


def find_shard(uri: str, plan: Plan, number: int, known: str | None) -> tuple[bytes | None, Found | None]:
    """Return the bytes that stand where a shard belongs, and what they are if they are sound.

    Where the manifest knows the shard, its SHA-256 decides; else the shard itself must say that it is
    whole (`shards.decode`).

    Raises
    ------
    ValueError
        If a shard of another simulation or schema stands there.
    """
    content = storage.read_if_there(shard_uri(uri, number))
    if content is None:
        return None, None
    if known is None:
        sound = _table(uri, plan, number, content) is not None
    else:
        sound = hashlib.sha256(content).hexdigest() == known
    return content, _found(plan, number, content) if sound else None


def place_shard(uri: str, plan: Plan, number: int, made: bytes, standing: bytes | None) -> tuple[Found, bool]:
    """Put a shard where nothing stands, or something that is not sound.

    Return what stands there in the end, and whether it is what has been put there.

    Another run may do the same at the same time, on another kind of processor: of two shards that
    hold the same rows the first one stays.
    """
    place = shard_uri(uri, number)
    for _ in range(3):
        if standing is not None:
            there = _table(uri, plan, number, standing)
            if there is not None and shards.agree(there, _table(uri, plan, number, made)):
                return _found(plan, number, standing), False
        if storage.write_if(place, made, standing=standing):
            return _found(plan, number, made), True
        standing = storage.read_if_there(place)
    raise storage.StorageError(f"{place}: something else keeps changing it; end that, and run the same command again.")


def finish(uri: str, plan: Plan, entries: list[Entry], processors: set[str]) -> Dataset:
    """Write the manifest, unless it stands already.

    Raises
    ------
    ValueError
        If a shard does not stand, or another run has extended the dataset meanwhile.
    """
    assert [entry.name for entry in entries] == [shard_name(number) for number in range(plan.num_shards)]
    missing = {entry.name for entry in entries} - standing_shards(uri)
    if missing:
        raise ValueError(
            f"{uri} lacks {len(missing)} shards that have been written, such as {min(missing)}: nodes that do not "
            "see the same folder wrote them, or something removes them. Choose s3:// or a folder that all nodes share."
        )
    if read_plan(uri) != plan:
        raise ValueError(f"{uri} has been extended by another run meanwhile, which finishes it.")
    manifest = Manifest(num_images=plan.num_images, processors=sorted(processors), shards=entries)
    if manifest != read_manifest(uri):
        storage.write(storage.join(uri, "manifest.json"), _manifest_json(manifest))
    return Dataset(uri, plan, manifest)


def verify(uri: str) -> list[str]:
    """Return what is wrong with the dataset at a URI, a line each; none if it is complete and sound."""
    uri = storage.absolute(uri)
    plan, standing = read_plan(uri), standing_shards(uri)
    try:
        manifest = read_manifest(uri)
    except ValueError as error:
        return [str(error)]
    if manifest is None:
        return [f"no manifest, and {len(standing)} of {plan.num_shards} shards: simulation did not finish"]
    wrong = []
    if manifest.num_images != plan.num_images or len(manifest.shards) != plan.num_shards:
        wrong.append(f"the manifest counts {manifest.num_images} images, the plan {plan.num_images}")
    if plan.simulation.digest != plan.digest and plan.simulator_version == SIMULATOR_VERSION:
        wrong.append(
            f"dataset.json has been changed: its simulation has digest {plan.simulation.digest}, not {plan.digest}"
        )
    stray = sorted(standing - {entry.name for entry in manifest.shards})
    wrong += [f"{name} is not in the manifest" for name in stray]

    def fault(numbered: tuple[int, Entry]) -> str | None:
        number, entry = numbered
        if entry.name != shard_name(number):
            return f"the manifest names {entry.name} where {shard_name(number)} belongs"
        if entry.name not in standing:
            return f"{entry.name} is missing"
        if find_shard(uri, plan, number, entry.sha256)[1] is None:
            return f"{entry.name} is damaged: it is not what its checksum says"
        return None

    with ThreadPoolExecutor(8) as pool:
        wrong += [line for line in pool.map(fault, enumerate(manifest.shards)) if line]
    return wrong


def _shards_of(plan: Plan) -> list[tuple[str, int]]:
    """Return the name and the number of rows of each shard."""
    return [(shard_name(number), len(plan.rows(number))) for number in range(plan.num_shards)]


def _standing_plan(content: bytes | None) -> Plan | None:
    return None if content is None else Plan.parse(json.loads(content))


def _extends(plan: Plan, there: Plan) -> bool:
    return plan.num_images > there.num_images and plan == there.override({"num_images": plan.num_images})


def _table(uri: str, plan: Plan, number: int, content: bytes) -> pa.Table | None:
    """Return the table of a shard's bytes; None if they are damaged."""
    try:
        return shards.decode(content, plan.simulation, plan.split, plan.rows(number))
    except shards.ForeignShardError as error:
        raise ValueError(
            f"{shard_uri(uri, number)} belongs to another dataset: {error}. Move it away, or choose another --to."
        ) from None
    except shards.DamagedShardError:
        return None


def _found(plan: Plan, number: int, content: bytes) -> Found:
    entry = Entry(
        name=shard_name(number),
        rows=len(plan.rows(number)),
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return Found(entry, shards.provenance(content))


def _manifest_json(manifest: Manifest) -> str:
    """Return a manifest with a line for each shard."""
    values = manifest.as_dict()
    lines = ",\n".join(json.dumps(entry) for entry in values.pop("shards"))
    return json.dumps(values)[:-1] + f', "shards": [\n{lines}\n]}}\n'


def _parse(kind: type[Any], place: str) -> Any:
    values = storage.read_json(place)
    try:
        return kind.parse(values)
    except ValueError as error:
        made = values.get("versions")
        by = made.get("raylens") if isinstance(made, dict) else None
        hint = f" It was made by raylens {by}; this is {__version__}." if by not in (None, __version__) else ""
        raise ValueError(f"{place}: {error}{hint}") from None


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"
