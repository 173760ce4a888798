"""What TensorBoard shows of a training: curves, predictions against truth, errors, example images, settings."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from raylens import models, storage

_NUM_POINTS = 2000  # in a scatter plot
_NUM_IMAGES = 16


class Board:
    """Writes the events of a run, readable while it goes on, also where the run lies on S3."""

    def __init__(self, run: str, card: models.Card) -> None:
        self._place, self._target = storage.join(run, "tensorboard"), card.target
        # Objects cannot be appended to: the file grows here and is put there anew.
        self._scratch = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._scratch.name)
        settings = {**card.model.as_dict(), **card.training.as_dict(), "num_training_images": card.num_training_images}
        texts = {
            name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings.items()
        }
        for summary in hparams(texts, {"validation_loss": None, "validation_rmse": None}):
            self._writer._get_file_writer().add_summary(summary)

    def show_images(self, image_BHW: torch.Tensor) -> None:
        """Show some images that are validated on."""
        self._writer.add_images("validation images", image_BHW[:_NUM_IMAGES].cpu().unsqueeze(1).clamp(0, 1))

    def add(self, record: dict[str, Any], true_B: torch.Tensor, predicted_B: torch.Tensor) -> None:
        """Add an epoch: its record, and truth and predictions of images that were validated on."""
        epoch = record["epoch"]
        for name, value in record.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self._writer.add_scalar(name, value, epoch)
        true, predicted = true_B.numpy(), predicted_B.numpy()
        if len(true):
            self._writer.add_histogram("error", predicted - true, epoch)
            self._writer.add_figure("predicted against true", self._scatter(true, predicted), epoch)
        self._writer.flush()
        storage.upload(self._scratch.name, self._place)

    def close(self) -> None:
        """Put the last events in their place."""
        self._writer.close()
        storage.upload(self._scratch.name, self._place)
        self._scratch.cleanup()

    def _scatter(self, true: np.ndarray, predicted: np.ndarray) -> Figure:
        figure = Figure(figsize=(5, 5), layout="constrained")
        axes = figure.subplots()
        axes.plot(true[:_NUM_POINTS], predicted[:_NUM_POINTS], ".", markersize=2)
        ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
        axes.plot(ends, ends, color="black", linewidth=1)
        axes.set(xlabel=f"true {self._target}", ylabel=f"predicted {self._target}", aspect="equal")
        return figure
