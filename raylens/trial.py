"""One training of a campaign: an epoch at a time on images that are in memory, until somebody ends it.

It is the training that `train` does with one worker, step by step the same, without what makes that survive in
the middle of an epoch. Below its place it keeps `metrics.jsonl`, a line for each epoch, and `checkpoint.safetensors`.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import safetensors
import torch

from raylens import checkpoint, learning, models, share, storage
from raylens.checkpoint import Position
from raylens.learning import Block
from raylens.metrics import Sums

CHECKPOINT = "checkpoint.safetensors"

_SECONDS_BETWEEN_CHECKPOINTS = 30.0


class Trial:
    """A network in training; it goes on where an earlier one at the same place stopped.

    Parameters
    ----------
    place
        URI of its folder.
    card
        What it trains, and for how long at most.
    train, validation
        All images, on the device that computes.
    """

    def __init__(self, place: str, card: models.Card, train: Block, validation: Block) -> None:
        self.place, self.card = place, card
        self.share, self.validation = share.Resident(train), share.Resident(validation)
        self.epoch = share.Epoch(len(train.target_B), card.training.batch_size, rank=0, world_size=1)
        self.device = train.image_BHW.device
        torch.manual_seed(card.training.seed)
        self.network = learning.on_device(models.build(card), self.device)
        self.steps = learning.optimizer(self.network, card.training)
        self.position = Position(world_size=1)
        self.take_step = self._step()
        kept = storage.read_if_there(storage.join(place, CHECKPOINT))
        if kept is not None:
            try:
                # One of a population becomes another network, for which what it had learnt is of no use.
                if checkpoint.settings_of(kept) == self.settings:
                    self.restore(kept)
            except (RuntimeError, KeyError, ValueError, safetensors.SafetensorError) as error:
                raise ValueError(f"{storage.join(place, CHECKPOINT)} is broken: {str(error).splitlines()[0]}") from None
        self.saved = time.monotonic()

    @property
    def history(self) -> list[dict[str, Any]]:
        """A record for each epoch that has ended."""
        return self.position.history

    @property
    def ended(self) -> bool:
        """Whether it has come to its last epoch, or lost patience."""
        training = self.card.training
        return len(self.history) >= training.num_epochs or learning.no_longer_improves(self.history, training)

    def train_epoch(self) -> dict[str, Any]:
        """Train and validate for an epoch; return its record.

        Raises
        ------
        ValueError
            If the loss is not finite.
        """
        training, position, started = self.card.training, self.position, time.perf_counter()
        learning.set_learning_rate(self.steps, training, position.epoch)
        seed = share.seed_of(training.seed, position.epoch, 0)
        torch.manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for step_loss in learning.train_epoch(self.take_step, self.share.batches(self.epoch, seed)):
            total += step_loss
        loss = float(total) / self.epoch.num_images
        spent = time.perf_counter() - started
        true_B, predicted_B = learning.validate(self.network, self.validation.blocks())
        sums = Sums.of(true_B.numpy(), predicted_B.numpy())
        if not (math.isfinite(loss) and math.isfinite(sums.rmse)):
            raise ValueError(f"training diverged: the loss in epoch {position.epoch} is not a finite number.")
        record = {
            "epoch": position.epoch,
            "train_loss": loss,
            "learning_rate": learning.learning_rate(training, position.epoch),
            "batch_size": training.batch_size,
            "images_per_second": self.epoch.num_images / spent,
            "validation_loss": learning.loss_of(sums, self.network, training.loss),
            "validation_rmse": sums.rmse,
            "validation_gradient": sums.gradient,
            "validation_bias": sums.bias,
            "seconds": time.perf_counter() - started,
        }
        self.history.append(record)
        lines = "".join(json.dumps(line) + "\n" for line in self.history)
        storage.write(storage.join(self.place, "metrics.jsonl"), lines)
        if time.monotonic() - self.saved > _SECONDS_BETWEEN_CHECKPOINTS:
            self.save()
        return record

    def _step(self) -> learning.Step:
        return learning.Step(
            self.network,
            self.network,
            self.steps,
            loss=self.card.training.loss,
            precision=self.card.training.precision,
            graph=self.device.type == "cuda",
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same of a training that goes on from a checkpoint of this one."""
        return {"model": self.card.model.as_dict(), "optimizer": self.card.training.optimizer}

    def packed(self) -> bytes:
        """Return what another process needs to go on from here."""
        return checkpoint.packed(self.network, self.steps, self.position, self.settings)

    def restore(self, content: bytes) -> None:
        """Go on from what `packed` returned."""
        self.position = checkpoint.unpack(content, self.network, self.steps)
        self.take_step = self._step()

    def save(self) -> None:
        """Keep what a later trial at this place needs to go on from here."""
        self.saved = time.monotonic()
        storage.write(storage.join(self.place, CHECKPOINT), self.packed())
