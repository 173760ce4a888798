"""One epoch of training and one pass of validation, in plain torch, over any iterable of batches or blocks.

A block is what a dataset gives at once: tensors image_BHW float32, num_subhalos_B and target_B
float32, on the device of the model, in the units of the dataset. `share` cuts batches from them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raylens.config import Training
from raylens.models import CNN

_NUM_AT_ONCE = 512  # images in a pass without gradients


class Block(NamedTuple):
    """Images and truth of some rows."""

    image_BHW: Tensor
    num_subhalos_B: Tensor
    target_B: Tensor

    def take(self, rows: Tensor | slice) -> Block:
        """Return some rows."""
        return Block(*(tensor[rows] for tensor in self))


class Batch(NamedTuple):
    """The rows of a step, and what a squared error counts in its loss: for one worker one over the number of rows."""

    rows: Block
    weight: float


def optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimiser of a training, in torch's fastest form of it."""
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), training.learning_rate, fused=True)
    return torch.optim.NAdam(model.parameters(), training.learning_rate, foreach=True)


def set_learning_rate(steps: torch.optim.Optimizer, training: Training, epoch: int) -> None:
    """Give the optimiser the learning rate of an epoch, counted from 1."""
    rate = training.learning_rate
    if training.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * (epoch - 1) / training.num_epochs)) / 2
    for group in steps.param_groups:
        group["lr"] = rate


def no_longer_improves(history: list[dict[str, Any]], training: Training) -> bool:
    """Return whether an epoch's validation loss has been the lowest for as long as a training has patience."""
    if training.patience is None or not history:
        return False
    best = min(history, key=lambda record: record["validation_loss"])
    return bool(history[-1]["epoch"] - best["epoch"] >= training.patience)


def train_epoch(
    model: nn.Module, network: CNN, batches: Iterable[Batch], steps: torch.optim.Optimizer
) -> Iterator[Tensor]:
    """Take a step for each batch; yield its sum of squared standardised errors, on the model's device.

    `model` is the network, or what distributes it; `network` is itself. The mean squared error is
    eq. 2.4, of the standardised target.
    """
    model.train()
    for rows, weight in batches:
        error_B = model(rows.image_BHW, rows.num_subhalos_B) - network.standardised(rows.target_B)
        squared_error = error_B.square().sum()
        steps.zero_grad()
        (squared_error * weight).backward()
        steps.step()
        yield squared_error.detach()


@torch.inference_mode()
def predict(network: CNN, image_BHW: Tensor, num_subhalos_B: Tensor) -> Tensor:
    """Return the predicted target (B,) in the units of the dataset."""
    network.eval()
    pairs = zip(image_BHW.split(_NUM_AT_ONCE), num_subhalos_B.split(_NUM_AT_ONCE), strict=True)
    return torch.cat([network.in_units(network(image, num_subhalos)) for image, num_subhalos in pairs])


def validate(network: CNN, blocks: Iterable[Block]) -> tuple[Tensor, Tensor]:
    """Return true and predicted target of all rows (B,), in the units of the dataset, on the CPU."""
    true, predicted = [torch.empty(0)], [torch.empty(0)]
    for block in blocks:
        true.append(block.target_B.cpu())
        predicted.append(predict(network, block.image_BHW, block.num_subhalos_B).cpu())
    return torch.cat(true), torch.cat(predicted)
