"""One epoch of training and one pass of validation, in plain torch, over any iterable of blocks.

A block is what a dataset gives at once: tensors image_BHW float32, num_subhalos_B and target_B
float32, on the device of the model, in the units of the dataset. Blocks should be large: batches
are cut from within them, after a shuffle.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from raylens.config import Training
from raylens.metrics import Sums
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


def optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimiser of a training, in torch's fastest form of it."""
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), training.learning_rate, fused=True)
    return torch.optim.NAdam(model.parameters(), training.learning_rate, foreach=True)


def train_epoch(
    model: nn.Module,
    network: CNN,
    blocks: Iterable[Block],
    steps: torch.optim.Optimizer,
    *,
    batch_size: int,
    shuffle: torch.Generator,
) -> np.ndarray:
    """Train on every row once; return the sum of squared standardised errors and the number of rows.

    `model` is the network, or what distributes it; `network` is itself. The mean squared error is
    eq. 2.4, of the standardised target.
    """
    model.train()
    squared_error_sum = 0.0
    num_rows = 0
    for block in blocks:
        order = torch.randperm(len(block.target_B), generator=shuffle).to(block.target_B.device)
        for rows in order.split(batch_size):
            batch = block.take(rows)
            error_B = model(batch.image_BHW, batch.num_subhalos_B) - network.standardised(batch.target_B)
            squared_error = error_B.square().sum()
            steps.zero_grad()
            (squared_error / len(rows)).backward()
            steps.step()
            squared_error_sum = squared_error_sum + squared_error.detach()
        num_rows += len(order)
    return np.array([float(squared_error_sum), num_rows])


@torch.inference_mode()
def predict(network: CNN, image_BHW: Tensor, num_subhalos_B: Tensor) -> Tensor:
    """Return the predicted target (B,) in the units of the dataset."""
    network.eval()
    pairs = zip(image_BHW.split(_NUM_AT_ONCE), num_subhalos_B.split(_NUM_AT_ONCE), strict=True)
    return torch.cat([network.in_units(network(image, num_subhalos)) for image, num_subhalos in pairs])


def validate(network: CNN, blocks: Iterable[Block]) -> Sums:
    """Return the sums from which every measure of the predictions follows."""
    sums = Sums()
    for block in blocks:
        predicted_B = predict(network, block.image_BHW, block.num_subhalos_B)
        sums = sums + Sums.of(block.target_B.cpu().numpy(), predicted_B.cpu().numpy())
    return sums
