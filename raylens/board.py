"""What TensorBoard shows of a training: curves, predictions against truth, errors, example images, settings."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from raylens import models, storage
from raylens.campaign import Tried

_NUM_POINTS = 2000  # in a scatter plot
_NUM_IMAGES = 16
_SECONDS_BETWEEN_UPLOADS = 5.0  # of a trial's curves


class Board:
    """Writes the events of a run, readable while it goes on, also where the run lies on S3."""

    def __init__(self, run: str, card: models.Card) -> None:
        self._place, self._target = storage.join(run, "tensorboard"), card.target
        # Objects cannot be appended to: the file grows here and is put there anew.
        self._scratch = tempfile.TemporaryDirectory()
        self._writer = SummaryWriter(self._scratch.name)
        settings = {**card.model.as_dict(), **card.training.as_dict(), "num_training_images": card.num_training_images}
        _add_settings(self._writer, settings)

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


class CampaignBoard:
    """Writes the curves of a campaign's trials and their hyper-parameters, each trial a run of its own."""

    def __init__(self, campaign: str) -> None:
        self._place = storage.join(campaign, "tensorboard")
        self._scratch = tempfile.TemporaryDirectory()
        self._writers: dict[str, SummaryWriter] = {}
        self._uploaded: dict[str, float] = {}

    def add(self, trial: Tried, record: dict[str, Any]) -> None:
        """Add an epoch of a trial."""
        if trial.id not in self._writers:
            writer = SummaryWriter(self._folder(trial))
            _add_settings(writer, trial.config)
            self._writers[trial.id], self._uploaded[trial.id] = writer, 0.0
        for name, value in record.items():
            if name != "epoch" and isinstance(value, (int, float)):
                self._writers[trial.id].add_scalar(name, value, record["epoch"])
        if time.monotonic() - self._uploaded[trial.id] > _SECONDS_BETWEEN_UPLOADS:
            self._writers[trial.id].flush()
            self._upload(trial)

    def end(self, trial: Tried) -> None:
        """Put what is known of a trial in its place; one without an epoch has left nothing."""
        if trial.id in self._writers:
            self._writers.pop(trial.id).close()
            self._upload(trial)

    def close(self) -> None:
        """Forget what has been put in its place."""
        self._scratch.cleanup()

    def _folder(self, trial: Tried) -> str:
        return os.path.join(self._scratch.name, trial.id)

    def _upload(self, trial: Tried) -> None:
        self._uploaded[trial.id] = time.monotonic()
        storage.upload(self._folder(trial), storage.join(self._place, trial.id))


def _add_settings(writer: SummaryWriter, settings: Mapping[str, Any]) -> None:
    texts = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in settings.items()}
    for summary in hparams(texts, {"validation_loss": None, "validation_rmse": None}):
        writer._get_file_writer().add_summary(summary)
