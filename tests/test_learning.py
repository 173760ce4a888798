"""An epoch uses every row once, and the networks can learn."""

import pytest
import torch
from test_models import network

from raylens import learning
from raylens.config import Model, Training

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
    shuffle = torch.Generator().manual_seed(0)

    for _ in range(200):
        squared_error_sum, num_rows = learning.train_epoch(cnn, cnn, [data], steps, batch_size=8, shuffle=shuffle)

    assert num_rows == 8
    assert squared_error_sum / num_rows < 0.01 * data.target_B.var()


@pytest.mark.parametrize(("sizes", "batch_size"), [([10], 4), ([7, 5, 1], 4), ([3], 16)])
def test_an_epoch_sees_every_image_once(sizes, batch_size):
    """Blocks and batches are of awkward sizes; none may lose or repeat a row."""
    seen = []

    class Watched(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, image_BHW, num_subhalos_B):
            assert len(image_BHW) <= batch_size
            seen.extend(num_subhalos_B.tolist())
            return self.inner(image_BHW, num_subhalos_B)

    cnn = network("n-cnn", SMALL, num_pixels=12)
    data = block(sum(sizes))
    blocks, first = [], 0
    for size in sizes:
        blocks.append(data.take(slice(first, first + size)))
        first += size

    learning.train_epoch(
        Watched(cnn), cnn, blocks, learning.optimizer(cnn, Training()), batch_size=batch_size, shuffle=torch.Generator()
    )

    assert sorted(seen) == sorted(data.num_subhalos_B.tolist())


def test_validation_is_the_measure_of_predictions_in_units():
    """What selects a checkpoint is the same number as in the table."""
    cnn = network("n-cnn", SMALL, num_pixels=12)
    cnn.target = cnn.target.model_copy(update={"mean": 380.0, "sd": 170.0})
    data = block(600)

    sums = learning.validate(cnn, [data.take(slice(0, 17)), data.take(slice(17, None))])
    predicted_B = learning.predict(cnn, data.image_BHW, data.num_subhalos_B)

    assert sums.num_images == 600
    assert sums.rmse == pytest.approx(float((predicted_B - data.target_B).square().mean().sqrt()), rel=1e-5)
