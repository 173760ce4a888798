"""Many images to predictions, with Ray Data: a task reads a shard itself and returns its predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray.data
import torch

from raylens import cluster, learning, models, shards
from raylens.dataset import Dataset

Progress = Callable[[int, int], None]  # images done, images in all

_NUM_READ_AT_ONCE = 1024  # images

# What an evaluation wants to know of a row beside its predictions.
_TRUTH = ["num_subhalos", "alpha"]


def predict(
    datasets: list[Dataset], *, n_cnn: str, alpha_cnn: str, progress: Progress = lambda done, total: None
) -> list[dict[str, np.ndarray]]:
    """Return truth and predictions of each dataset as columns, in the order of its rows.

    num_subhalos, alpha; n_cnn, alpha_cnn (given the N that the N-CNN predicts) and
    alpha_cnn_true_n (given the true N).
    """
    cluster.connect()
    numbered = [(number, uri) for number, data in enumerate(datasets) for uri in data.shard_uris]

    def predicted(batch: dict[str, np.ndarray]) -> pa.Table:
        number, uri = numbered[int(batch["id"][0])]
        table = _predict_rows(shards.read(uri, ["index", "image", *_TRUTH]), n_cnn, alpha_cnn)
        return table.append_column("dataset", pa.array([number] * len(table)))

    num_images = sum(data.num_images for data in datasets)
    rows = ray.data.range(len(numbered), override_num_blocks=len(numbered)).map_batches(predicted, batch_size=1)
    tables: list[pa.Table] = []
    for table in rows.iter_batches(batch_format="pyarrow", batch_size=_NUM_READ_AT_ONCE):
        tables.append(table)
        progress(sum(map(len, tables)), num_images)
    table = pa.concat_tables(tables).sort_by("index")
    names = [name for name in table.column_names if name != "dataset"]
    number = table["dataset"].to_numpy()
    return [{name: table[name].to_numpy()[number == k] for name in names} for k in range(len(datasets))]


def _predict_rows(table: pa.Table, n_cnn: str, alpha_cnn: str) -> pa.Table:
    torch.set_num_threads(1)  # a task has one core
    image_BHW = torch.from_numpy(np.array(shards.images(table)))
    true_B = torch.from_numpy(table["num_subhalos"].to_numpy().astype(np.float32))
    num_subhalos_B = learning.predict(_network(n_cnn, "n-cnn"), image_BHW, true_B)
    alpha_network = _network(alpha_cnn, "alpha-cnn")
    columns = {
        "n_cnn": num_subhalos_B,
        "alpha_cnn": learning.predict(alpha_network, image_BHW, num_subhalos_B),
        "alpha_cnn_true_n": learning.predict(alpha_network, image_BHW, true_B),
    }
    kept = table.select(["index", *_TRUTH])
    for name, values in columns.items():
        kept = kept.append_column(name, pa.array(values.numpy()))
    return kept


@lru_cache(maxsize=4)
def _network(run: str, name: models.NetworkName) -> models.CNN:
    """Return a trained network, read once in each process."""
    return models.load(run, name)
