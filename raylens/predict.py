"""Many images to predictions, with Ray Data: a task reads a shard itself and returns its predictions.

The networks are read once, here, and given to the tasks: a worker outlives them, and may stand in
another folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import ray
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
) -> tuple[list[dict[str, np.ndarray]], float]:
    """Return truth and predictions of each dataset as columns, in the order of its rows, and the CPU-seconds taken.

    num_subhalos, alpha; n_cnn, alpha_cnn (given the N that the N-CNN predicts) and
    alpha_cnn_true_n (given the true N).
    """
    trained = models.load(n_cnn, "n-cnn"), models.load(alpha_cnn, "alpha-cnn")
    cluster.connect()
    networks = ray.put(trained)
    numbered = [(number, *part) for number, data in enumerate(datasets) for part in data.parts]

    def predicted(batch: dict[str, np.ndarray]) -> pa.Table:
        began = time.process_time()
        number, uri, num_rows = numbered[int(batch["id"][0])]
        rows = shards.read(uri, ["index", "image", *_TRUTH])[:num_rows]
        table = _predict_rows(rows, *ray.get(networks))
        share = (time.process_time() - began) / len(table)
        columns = {"dataset": np.full(len(table), number), "cpu_seconds": np.full(len(table), share)}
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values))
        return table

    num_images = sum(data.num_images for data in datasets)
    rows = ray.data.range(len(numbered), override_num_blocks=len(numbered)).map_batches(predicted, batch_size=1)
    tables: list[pa.Table] = []
    for table in rows.iter_batches(batch_format="pyarrow", batch_size=_NUM_READ_AT_ONCE):
        tables.append(table)
        progress(sum(map(len, tables)), num_images)
    table = pa.concat_tables(tables).sort_by("index")
    names = [name for name in table.column_names if name not in ("dataset", "cpu_seconds")]
    number = table["dataset"].to_numpy()
    columns = [{name: table[name].to_numpy()[number == k] for name in names} for k in range(len(datasets))]
    return columns, float(table["cpu_seconds"].to_numpy().sum())


def _predict_rows(table: pa.Table, n_cnn: models.CNN, alpha_cnn: models.CNN) -> pa.Table:
    torch.set_num_threads(1)  # a task has one core
    image_BHW = torch.from_numpy(np.array(shards.images(table)))
    true_B = torch.from_numpy(table["num_subhalos"].to_numpy().astype(np.float32))
    num_subhalos_B = learning.predict(n_cnn, image_BHW, true_B)
    columns = {
        "n_cnn": num_subhalos_B,
        "alpha_cnn": learning.predict(alpha_cnn, image_BHW, num_subhalos_B),
        "alpha_cnn_true_n": learning.predict(alpha_cnn, image_BHW, true_B),
    }
    kept = table.select(["index", *_TRUTH])
    for name, values in columns.items():
        kept = kept.append_column(name, pa.array(values.numpy()))
    return kept
