"""Many images to predictions, with Ray Data: a batch of rows in, the same rows with predictions out."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa
import ray.data
import torch

from raylens import cluster, dataset, learning, models, storage
from raylens.dataset import Dataset

# What an evaluation wants to know of a row beside its predictions.
_TRUTH = ["num_subhalos", "alpha"]


def predict(data: Dataset, *, n_cnn: str, alpha_cnn: str) -> dict[str, np.ndarray]:
    """Return truth and predictions of a dataset as columns, in the order of its rows.

    num_subhalos, alpha; n_cnn, alpha_cnn (given the N that the N-CNN predicts) and
    alpha_cnn_true_n (given the true N).
    """
    cluster.connect()
    file_system, _ = storage.arrow_file_system(data.uri)
    paths = [storage.arrow_file_system(uri)[1] for uri in data.shard_uris]
    rows = ray.data.read_parquet(paths, filesystem=file_system, columns=["index", "image", *_TRUTH])

    def predicted(table: pa.Table) -> pa.Table:
        return _predict_rows(table, n_cnn, alpha_cnn)

    tables = list(rows.map_batches(predicted, batch_format="pyarrow", batch_size=None).iter_batches(
        batch_format="pyarrow", batch_size=None
    ))  # fmt: skip
    table = pa.concat_tables(tables).sort_by("index")
    return {name: table[name].to_numpy() for name in table.column_names}


def _predict_rows(table: pa.Table, n_cnn: str, alpha_cnn: str) -> pa.Table:
    torch.set_num_threads(1)  # a task has one core
    image_BHW = torch.from_numpy(np.array(dataset.images(table)))
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
