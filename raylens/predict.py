"""Many images to predictions, with Ray Data: a task reads files or shards itself and returns its predictions.

`predict` takes any images and writes a Parquet file; `predict_with_truth` is what an evaluation wants
of datasets. The networks are read once, here, and given to the tasks: a worker outlives them, and
may stand in another folder.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from raylens import __version__, cluster, image, intake, learning, models, shards, storage
from raylens.dataset import Dataset

Progress = Callable[..., None]  # how much is done, how much there is in all, and in words what else is known

_NUM_AT_ONCE = 512  # images
_NUM_TOLD = 10  # of the images that are skipped; the file that is written names all
# Each task costs the driver some 14 ms, so that of very many files it takes several.
_MAX_TASKS, _MAX_TASKS_PER_CPU = 1024, 4

# What is known of a dataset's row and may be compared with its predictions.
_TRUTH = ["num_subhalos", "alpha"]

# The columns that are written: type, unit and meaning.
_COLUMNS: dict[str, tuple[pa.DataType, str, str]] = {
    "file": (pa.string(), "", "name of the file in which the image lies"),
    "number": (pa.int64(), "1", "which image of that file, from 0"),
    "n_cnn": (pa.float32(), "1", "predicted number of subhaloes N; null where the image is skipped"),
    "alpha_cnn": (pa.float32(), "1", "predicted slope of the subhalo mass function, given the predicted N"),
    "skipped": (pa.string(), "", "why the image is skipped; null where it is not"),
}
_COLUMNS_OF_DATASET: dict[str, tuple[pa.DataType, str, str]] = {
    "index": (pa.int64(), "1", "row of the dataset"),
    "num_subhalos": (pa.int32(), "1", "true number of subhaloes N"),
    "alpha": (pa.float32(), "1", "true slope of the subhalo mass function"),
}


@dataclass(frozen=True)
class Predicted:
    """What a call of `predict` made, and what that cost."""

    predictions: str  # URI
    num_files: int
    num_ignored: int  # other files in the folder
    num_images: int  # the skipped ones included
    num_skipped: int
    num_without_pixel_scale: int  # predicted images that state none, taken at the networks'
    skipped: list[dict[str, str | int]]  # the first of them: file, number and reason
    seconds: float
    cpu_seconds: float
    gpu_seconds: float
    images_per_second: float


def predict(
    images: str, to: str, *, n_cnn: str, alpha_cnn: str, progress: Progress = lambda done, total, detail: None
) -> Predicted:
    """Predict N and alpha of images with two trained networks, and write a Parquet file with a row for each.

    Parameters
    ----------
    images
        URI of a dataset, of a file of images (`intake`), or of a folder of such files.
    progress
        Told how many files are done.

    Raises
    ------
    ValueError
        If there are no images, if none of them can be predicted, if the two networks do not belong
        together, or if `to` is no place for the result.
    OSError
        If a file, or a shard of a dataset, cannot be read from its place, or the result not be written.
    """
    started = time.perf_counter()
    images, to, n_cnn, alpha_cnn = (storage.absolute(uri) for uri in (images, to, n_cnn, alpha_cnn))
    found = intake.find(images)
    _require_place(to, images)
    cards, networks = _load(n_cnn, alpha_cnn, [found.data] if found.data else [])
    files, card = found.files, cards[0]

    def predicted(sources: list[int]) -> pa.Table:
        rows = (
            _Row(source, number, *given)
            for source in sources
            for number, given in enumerate(intake.images(files[source], card))
        )
        trained = ray.get(networks)
        return pa.concat_tables(_predict_rows(some, *trained) for some in _batches(rows))

    num_done = 0

    def tell(num_files: int, num_new: int) -> None:
        nonlocal num_done
        num_done += num_new
        cluster.publish(to, images_predicted=num_done)
        progress(num_files, len(files), f"{num_done:,} images")

    table, cpu_seconds = _gather(len(files), predicted, tell)
    skipped = table["skipped"].is_valid().to_numpy()
    columns = _columns(table, found)
    told = columns.filter(pa.array(skipped)).slice(0, _NUM_TOLD).select(["file", "number", "skipped"]).to_pylist()
    if skipped.all():
        raise ValueError(
            f"none of the {len(table):,} images of {images} can be predicted; the first, number {told[0]['number']} "
            f"in {told[0]['file']}: {told[0]['skipped']}"
        )
    origin = {"images": images, "raylens": __version__}
    for name, run, of in zip(("n_cnn", "alpha_cnn"), (n_cnn, alpha_cnn), cards, strict=True):
        origin |= {name: run, f"{name}.dataset_digest": of.dataset_digest}
    file = io.BytesIO()
    pq.write_table(columns.replace_schema_metadata(origin), file)
    storage.write(to, file.getvalue())
    seconds = time.perf_counter() - started
    return Predicted(
        predictions=to,
        num_files=len(files),
        num_ignored=found.num_ignored,
        num_images=len(table),
        num_skipped=int(skipped.sum()),
        num_without_pixel_scale=int((~skipped & ~table["states_scale"].to_numpy()).sum()),
        skipped=[{"file": row["file"], "number": row["number"], "reason": row["skipped"]} for row in told],
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        gpu_seconds=0.0,
        images_per_second=len(table) / seconds,
    )


def predict_with_truth(
    datasets: list[Dataset], *, n_cnn: str, alpha_cnn: str, progress: Progress = lambda done, total: None
) -> tuple[list[dict[str, np.ndarray]], float]:
    """Return truth and predictions of each dataset as columns, in the order of its rows, and the CPU-seconds taken.

    num_subhalos, alpha; n_cnn, alpha_cnn (given the N that the N-CNN predicts) and
    alpha_cnn_true_n (given the true N).

    Raises
    ------
    ValueError
        If the networks were not trained on images like those of each dataset, or of each other.
    """
    cards, networks = _load(n_cnn, alpha_cnn, datasets)
    normalise = cards[0].normalised
    numbered = [(number, *part) for number, data in enumerate(datasets) for part in data.parts]
    num_images, num_done = sum(data.num_images for data in datasets), 0

    def predicted(sources: list[int]) -> pa.Table:
        trained = ray.get(networks)
        tables = []
        for source in sources:
            _, uri, num_rows = numbered[source]
            table = shards.read(uri, ["index", "image", *_TRUTH])[:num_rows]
            table = _predict_truth(table, normalise, *trained)
            tables.append(table.append_column("source", pa.array(np.full(len(table), source))))
        return pa.concat_tables(tables)

    def tell(num_shards: int, num_new: int) -> None:
        nonlocal num_done
        num_done += num_new
        progress(num_done, num_images)

    table, cpu_seconds = _gather(len(numbered), predicted, tell)
    of = np.array([number for number, _, _ in numbered])[table["source"].to_numpy()]
    names = [*_TRUTH, "n_cnn", "alpha_cnn", "alpha_cnn_true_n"]
    return [{name: table[name].to_numpy()[of == k] for name in names} for k in range(len(datasets))], cpu_seconds


class _Row(NamedTuple):
    source: int  # number of the file
    number: int
    image: np.ndarray | str  # or the reason why there is none
    states_scale: bool


def _require_place(to: str, images: str) -> None:
    """Refuse to write what is no Parquet file, where it cannot be written, or where it would be read as images."""
    folder = to.rpartition("/")[0]
    if not to.endswith(".parquet"):
        raise ValueError(f"the file to write must end in .parquet; got {to}.")
    if folder == images or to == images:
        raise ValueError(
            f"{to} lies among the images, and would be read as one of them the next time; choose another --to."
        )
    storage.check_writable(folder)


def _load(n_cnn: str, alpha_cnn: str, datasets: list[Dataset]) -> tuple[tuple[models.Card, models.Card], ray.ObjectRef]:
    """Return what is known of the two networks, and themselves on the cluster, once all is known to go together."""
    n_card, alpha_card = models.read_card(n_cnn, "n-cnn"), models.read_card(alpha_cnn, "alpha-cnn")
    models.require_same_images(n_card, alpha_card)
    for data in datasets:
        camera = data.plan.simulation.camera
        try:
            models.require_fit(
                n_card,
                shape=(data.num_pixels, data.num_pixels),
                pixel_scale=camera.pixel_scale,
                normalised=camera.normalise,
            )
        except ValueError as error:
            raise ValueError(f"{n_cnn} cannot predict {data.uri}: {error}") from None
    trained = models.load(n_cnn, "n-cnn"), models.load(alpha_cnn, "alpha-cnn")
    cluster.connect()
    return (n_card, alpha_card), ray.put(trained)


def _gather(
    num_sources: int, predicted: Callable[[list[int]], pa.Table], tell: Callable[[int, int], None]
) -> tuple[pa.Table, float]:
    """Return what tasks predict of all sources, sorted by `source` and `number`, and the CPU-seconds taken.

    `tell` is told how many sources are done, and how many rows are new.
    """

    def timed(batch: dict[str, np.ndarray]) -> pa.Table:
        began = time.process_time()
        learning.compute_with(1)  # a task has one core
        table = predicted(batch["id"].tolist())
        share = (time.process_time() - began) / len(table)
        return table.append_column("cpu_seconds", pa.array(np.full(len(table), share)))

    num_tasks = min(num_sources, max(_MAX_TASKS, _MAX_TASKS_PER_CPU * cluster.connect().num_cpus))
    numbers = cluster.numbers(num_sources, num_tasks, where=cluster.where_to_predict())
    blocks = numbers.map_batches(timed, batch_size=None)
    tables: list[pa.Table] = []
    num_done = 0
    for table in blocks.iter_batches(batch_format="pyarrow", batch_size=None):
        tables.append(table)
        num_done += len(pc.unique(table["source"]))
        tell(num_done, len(table))
    table = pa.concat_tables(tables).sort_by([("source", "ascending"), ("number", "ascending")])
    return table, float(table["cpu_seconds"].to_numpy().sum())


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while some := list(islice(rows, _NUM_AT_ONCE)):
        yield some


def _predict_rows(rows: list[_Row], n_cnn: models.CNN, alpha_cnn: models.CNN) -> pa.Table:
    skipped = np.array([isinstance(row.image, str) for row in rows])
    n_B, alpha_B = np.zeros((2, len(rows)), np.float32)
    if not skipped.all():
        image_BHW = torch.from_numpy(np.stack([row.image for row in rows if not isinstance(row.image, str)]))
        num_subhalos_B = learning.predict(n_cnn, image_BHW, torch.zeros(len(image_BHW)))
        n_B[~skipped] = num_subhalos_B.numpy()
        alpha_B[~skipped] = learning.predict(alpha_cnn, image_BHW, num_subhalos_B).numpy()
    return pa.table(
        {
            "source": pa.array([row.source for row in rows], pa.int64()),
            "number": pa.array([row.number for row in rows], pa.int64()),
            "states_scale": pa.array([row.states_scale for row in rows], pa.bool_()),
            "n_cnn": pa.array(n_B, mask=skipped),
            "alpha_cnn": pa.array(alpha_B, mask=skipped),
            "skipped": pa.array([row.image if isinstance(row.image, str) else None for row in rows], pa.string()),
        }
    )


def _predict_truth(table: pa.Table, normalise: bool, n_cnn: models.CNN, alpha_cnn: models.CNN) -> pa.Table:
    pixels = shards.images(table)
    image_BHW = torch.from_numpy(image.normalise(pixels) if normalise else pixels.copy())
    true_B = torch.from_numpy(table["num_subhalos"].to_numpy().astype(np.float32))
    num_subhalos_B = learning.predict(n_cnn, image_BHW, true_B)
    columns = {
        "n_cnn": num_subhalos_B,
        "alpha_cnn": learning.predict(alpha_cnn, image_BHW, num_subhalos_B),
        "alpha_cnn_true_n": learning.predict(alpha_cnn, image_BHW, true_B),
    }
    kept = table.select(["index", *_TRUTH]).rename_columns(["number", *_TRUTH])
    for name, values in columns.items():
        kept = kept.append_column(name, pa.array(values.numpy()))
    return kept


def _columns(table: pa.Table, found: intake.Found) -> pa.Table:
    """Return the columns that are written, each with its unit and meaning."""
    about = dict(_COLUMNS)
    values: dict[str, Any] = {name: table[name] for name in _COLUMNS if name != "file"}
    values["file"] = pa.array([file.name for file in found.files]).take(table["source"].combine_chunks())
    if found.data:
        about |= _COLUMNS_OF_DATASET
        values |= found.data.read(list(_COLUMNS_OF_DATASET))  # in the order of its shards and their rows, as here
    fields = [
        pa.field(name, kind, metadata={"unit": unit, "description": meaning} if unit else {"description": meaning})
        for name, (kind, unit, meaning) in about.items()
    ]
    return pa.table(values, schema=pa.schema(fields))
