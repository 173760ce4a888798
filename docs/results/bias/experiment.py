"""Why the N-CNN is biased when it learns N as it is.

    python docs/results/bias/experiment.py

It is trained with several scalings of N. After each epoch the validation images are predicted in four modes: dropout
on or off, and batch normalisation by the statistics of the batch or by its running ones. Training is the first of
them, evaluation the last. Writes bias.json beside this file.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from raylens import learning, recipes, share
from raylens.config import Network
from raylens.learning import Block
from raylens.metrics import Sums
from raylens.models import CNN, Scaling
from raylens.simulate import simulate_block

NUM_TRAINING, NUM_VALIDATION, NUM_EPOCHS, NUM_THREADS = 20_000, 4_000, 5, 2
BATCH_SIZE = 16  # also of the batches whose statistics normalise
MODES = {
    "training": (True, True),  # dropout, statistics of the batch
    "dropout alone": (True, False),
    "batch statistics alone": (False, True),
    "evaluation": (False, False),
}


def images(split: str, num_images: int) -> Block:
    """Return rows of the recipe paper-fixed, as a dataset of it has them."""
    simulation = recipes.paper_fixed().simulation
    blocks = [simulate_block(simulation, range(first, first + 500), split) for first in range(0, num_images, 500)]
    image, num_subhalos = (np.concatenate([block[name] for block in blocks]) for name in ("image", "num_subhalos"))
    num_subhalos_B = torch.from_numpy(num_subhalos.astype(np.float32))
    return Block(torch.from_numpy(image), num_subhalos_B, num_subhalos_B)


def variants(target_B: torch.Tensor) -> dict[str, tuple[Scaling, float]]:
    """Return how each variant scales N, and its dropout."""
    mean, sd = float(target_B.mean()), float(target_B.std())
    return {
        "standardised": (Scaling(offset=mean, scale=sd), 0.25),
        "raw": (Scaling(offset=0.0, scale=1.0), 0.25),
        "mean subtracted": (Scaling(offset=mean, scale=1.0), 0.25),
        "divided by sd": (Scaling(offset=0.0, scale=sd), 0.25),
        "raw, no dropout": (Scaling(offset=0.0, scale=1.0), 0.0),
    }


def set_mode(network: CNN, *, dropout: bool, batch_statistics: bool) -> None:
    network.eval()
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(dropout)
        if isinstance(layer, nn.BatchNorm2d):
            layer.train(batch_statistics)


@torch.no_grad()
def look(network: CNN, block: Block) -> dict[str, Any]:
    """Return bias and RMSE in each mode, and by how much the last features pull the prediction up and down."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    seen: dict[str, Any] = {}
    for mode, (dropout, batch_statistics) in MODES.items():
        set_mode(network, dropout=dropout, batch_statistics=batch_statistics)
        torch.manual_seed(0)
        features_BF = torch.cat([network.features(part.unsqueeze(1)) for part in block.image_BHW.split(BATCH_SIZE)])
        predicted_B = network.in_units(network.head(features_BF).squeeze(1))
        sums = Sums.of(block.target_B.numpy(), predicted_B.numpy())
        terms_BF = features_BF * network.head.weight * network.target.scale
        seen[mode] = {
            "bias": sums.bias,
            "rmse": sums.rmse,
            "pulls_up": float(terms_BF.clamp(min=0).sum(1).mean()),
            "pulls_down": float(terms_BF.clamp(max=0).sum(1).mean()),
        }
        for name, buffer in network.named_buffers():  # statistics of these images must not stay
            buffer.copy_(kept[name])
    return seen


def train(scaling: Scaling, dropout: float, training: Block, validation: Block) -> list[dict[str, Any]]:
    """Return what is seen after each epoch of the paper's N-CNN with its batch and learning rate."""
    settings: Network = recipes.paper_fixed().n_cnn
    torch.manual_seed(0)
    model = settings.model.override({"dropout": dropout})
    network = CNN("n-cnn", model, num_pixels=60, target=scaling, num_subhalos=scaling)
    network = learning.on_device(network, torch.device("cpu"))
    step = learning.Step(network, network, learning.optimizer(network, settings.training))
    epoch = share.Epoch(len(training.target_B), BATCH_SIZE, rank=0, world_size=1)
    seen = []
    for number in range(1, NUM_EPOCHS + 1):
        seed = share.seed_of(0, number, 0)
        torch.manual_seed(seed)
        loss = sum(float(total) for total in learning.train_epoch(step, share.Resident(training).batches(epoch, seed)))
        training_rmse = (loss / epoch.num_images) ** 0.5 * scaling.scale
        seen.append({"epoch": number, "training_rmse": training_rmse, **look(network, validation)})
    return seen


if __name__ == "__main__":
    started = time.perf_counter()
    learning.compute_with(NUM_THREADS)
    training, validation = images("train", NUM_TRAINING), images("validation", NUM_VALIDATION)
    found = {name: train(*how, training, validation) for name, how in variants(training.target_B).items()}
    record = {
        "num_training_images": NUM_TRAINING,
        "num_validation_images": NUM_VALIDATION,
        "batch_size": BATCH_SIZE,
        "num_threads": NUM_THREADS,
        "torch": torch.__version__,
        "modes": list(MODES),
        "seconds": time.perf_counter() - started,
        "variants": found,
    }
    Path(__file__).with_name("bias.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, epochs in found.items():
        print(f"{name:18}", *(f"{mode} {epochs[-1][mode]['bias']:+7.1f} " for mode in MODES))
