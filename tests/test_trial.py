"""A trial: it is the training that it stands for, goes on where it stopped, and leaves the images where they are."""

import json

import numpy as np
import pytest
import torch

from raylens import models
from raylens.config import Model, Training
from raylens.learning import Block
from raylens.trial import CHECKPOINT, Trial


@pytest.fixture(scope="module")
def blocks() -> list[Block]:
    """Spots whose brightness is the target, to train and to validate on."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for num_images in (96, 32):
        target = torch.rand(num_images, generator=generator) * 100
        image = torch.rand((num_images, 12, 12), generator=generator) + target[:, None, None] / 50
        made.append(Block(image, target, target))
    return made


def card(**training: object) -> models.Card:
    scaling = models.Scaling(offset=50.0, scale=29.0)
    return models.Card.model_construct(
        network="n-cnn",
        num_pixels=12,
        model=Model(filters=(4,), kernel_size=3, dense=16),
        training=Training(**{"num_epochs": 6, "learning_rate": 1e-3, **training}),
        target_scaling=scaling,
        num_subhalos_scaling=scaling,
    )


def losses(trial: Trial) -> list[tuple[float, float]]:
    return [(record["train_loss"], record["validation_loss"]) for record in trial.history]


def run(trial: Trial) -> Trial:
    while not trial.ended:
        trial.train_epoch()
    return trial


@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
def test_a_trial_that_is_taken_up_equals_one_that_was_not_disturbed(blocks, tmp_path, optimizer):
    """To the digit: weights, moments and seeds are in its checkpoint."""
    settings = card(optimizer=optimizer, schedule="cosine")
    undisturbed = run(Trial(str(tmp_path / "whole"), settings, *blocks))
    begun = Trial(str(tmp_path / "cut"), settings, *blocks)
    for _ in range(3):
        begun.train_epoch()
    begun.save()
    begun.train_epoch()  # which is lost

    taken_up = Trial(str(tmp_path / "cut"), settings, *blocks)
    assert len(taken_up.history) == 3
    run(taken_up)

    assert losses(taken_up) == losses(undisturbed)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_trial_learns(blocks, tmp_path):
    """Or all that follows would rank noise."""
    trial = run(Trial(str(tmp_path), card(num_epochs=20, learning_rate=1e-2), *blocks))

    assert trial.history[-1]["validation_loss"] < 0.5
    assert trial.history[-1]["validation_rmse"] < 0.75 * np.std(blocks[1].target_B.numpy())


def test_a_trial_reads_the_images_in_place(blocks, tmp_path):
    """Of a dataset in shared memory each further trial must not make a copy."""
    trial = run(Trial(str(tmp_path), card(num_epochs=1), *blocks))

    assert trial.share.block is not None
    assert trial.share.block.image_BHW.data_ptr() == blocks[0].image_BHW.data_ptr()


def test_a_trial_that_diverges_says_so(blocks, tmp_path):
    with pytest.raises(ValueError, match="diverged: the loss in epoch 1"):
        run(Trial(str(tmp_path), card(learning_rate=1e30), *blocks))


def test_a_trial_without_patience_left_has_ended(blocks, tmp_path):
    trial = run(Trial(str(tmp_path), card(num_epochs=1000, patience=2, learning_rate=1e-2), *blocks))

    best = min(trial.history, key=lambda record: record["validation_loss"])
    assert trial.history[-1]["epoch"] == best["epoch"] + 2


def test_a_checkpoint_of_another_network_is_not_gone_on_from(blocks, tmp_path):
    """One of a population that has become another network begins with nothing, and is then given weights."""
    trial = Trial(str(tmp_path), card(), *blocks)
    trial.train_epoch()
    trial.save()
    network = card().model_copy(update={"model": Model(filters=(8,), kernel_size=3, dense=16)})

    assert len(Trial(str(tmp_path), card(learning_rate=1e-4), *blocks).history) == 1
    for other in (network, card(optimizer="nadam")):
        assert not Trial(str(tmp_path), other, *blocks).history


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", b"\x08" + bytes(7) + b'{"a": 1}'])
def test_a_checkpoint_that_is_broken_is_refused(blocks, tmp_path, content):
    (tmp_path / CHECKPOINT).write_bytes(content)

    with pytest.raises(ValueError, match=f"{CHECKPOINT} is broken: "):
        Trial(str(tmp_path), card(), *blocks)
