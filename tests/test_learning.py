"""An epoch uses every row once, and the networks can learn."""

import pytest
import torch
from test_models import network

from raylens import learning
from raylens.config import Model, Training
from raylens.metrics import Sums

SMALL = Model(filters=(4,), kernel_size=3, dense=32, dropout=0.0)


def block(num_images: int, num_pixels: int = 12) -> learning.Block:
    generator = torch.Generator().manual_seed(1)
    image_BHW = torch.rand(num_images, num_pixels, num_pixels, generator=generator)
    num_subhalos_B = torch.rand(num_images, generator=generator)
    return learning.Block(image_BHW, num_subhalos_B, torch.randn(num_images, generator=generator))


@pytest.mark.parametrize("name", ["n-cnn", "alpha-cnn"])
@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
def test_network_overfits_eight_images(name, optimizer):
    """A network that cannot learn eight images by heart has a fault between loss and weights."""
    torch.manual_seed(0)
    cnn = network(name, SMALL, num_pixels=12)
    data = block(8)
    steps = learning.optimizer(cnn, Training(learning_rate=1e-2, optimizer=optimizer))

    batches = [learning.Batch(data, 1 / 8)] * 200
    *_, squared_error_sum = learning.train_epoch(cnn, cnn, batches, steps)

    assert squared_error_sum / 8 < 0.01 * data.target_B.var()


def test_the_learning_rate_follows_its_schedule():
    """The paper's is constant; a cosine ends near zero."""
    cnn = network("n-cnn", SMALL, num_pixels=12)
    rates = {}
    for schedule in ("constant", "cosine"):
        training = Training(num_epochs=4, learning_rate=0.1, schedule=schedule)
        steps = learning.optimizer(cnn, training)
        rates[schedule] = []
        for epoch in (1, 2, 3, 4):
            learning.set_learning_rate(steps, training, epoch)
            rates[schedule].append(steps.param_groups[0]["lr"])

    assert rates["constant"] == [0.1] * 4
    assert rates["cosine"] == pytest.approx([0.1, 0.05 * (1 + 0.5**0.5), 0.05, 0.05 * (1 - 0.5**0.5)])


def test_validation_is_the_measure_of_predictions_in_units():
    """What selects a checkpoint is the same number as in the table."""
    cnn = network("n-cnn", SMALL, num_pixels=12)
    cnn.target = cnn.target.model_copy(update={"mean": 380.0, "sd": 170.0})
    data = block(600)

    sums = Sums.of(*learning.validate(cnn, [data.take(slice(0, 17)), data.take(slice(17, None))]))
    predicted_B = learning.predict(cnn, data.image_BHW, data.num_subhalos_B)

    assert sums.num_images == 600
    assert sums.rmse == pytest.approx(float((predicted_B - data.target_B).square().mean().sqrt()), rel=1e-5)
