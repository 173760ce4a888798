"""An epoch uses every row once, and the networks can learn."""

import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from test_models import network

from raylens import checkpoint, learning, models
from raylens.checkpoint import Position
from raylens.config import Model, Training
from raylens.metrics import Sums

SMALL = Model(filters=(4,), kernel_size=3, dense=32, dropout=0.0)
WITH_CHANCE = SMALL.override({"filters": [4, 8], "dropout": 0.25})
TRAINING = Training(num_epochs=3, learning_rate=1e-2, schedule="cosine")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and here is none")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def block(num_images: int, num_pixels: int = 12) -> learning.Block:
    generator = torch.Generator().manual_seed(1)
    image_BHW = torch.rand(num_images, num_pixels, num_pixels, generator=generator)
    num_subhalos_B = torch.rand(num_images, generator=generator)
    return learning.Block(image_BHW, num_subhalos_B, torch.randn(num_images, generator=generator))


@pytest.mark.parametrize("name", ["n-cnn", "alpha-cnn"])
@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
@pytest.mark.parametrize(("precision", "left"), [("float32", 0.01), ("bfloat16", 0.1)])
def test_network_overfits_eight_images(name, optimizer, precision, left):
    """A network that cannot learn eight images by heart has a fault between loss and weights."""
    torch.manual_seed(0)
    cnn = network(name, SMALL, num_pixels=12)
    data = block(8)
    steps = learning.optimizer(cnn, Training(learning_rate=1e-2, optimizer=optimizer))

    batches = [learning.Batch(data, 1 / 8)] * 200
    *_, squared_error_sum = learning.train_epoch(learning.Step(cnn, cnn, steps, precision=precision), batches)

    assert squared_error_sum / 8 < left * data.target_B.var()


@pytest.mark.parametrize(("loss", "best"), [("mse", 2.5), ("mae", 1.0)])
def test_a_loss_is_least_where_it_should_be(loss, best):
    """Of images that are all alike the squared error learns the mean, and the absolute error the median."""
    torch.manual_seed(0)
    cnn = network("n-cnn", SMALL, num_pixels=12)
    target_B = torch.tensor([0.0, 1.0, 1.0, 8.0])
    data = learning.Block(torch.ones(4, 12, 12), torch.zeros(4), target_B)
    step = learning.Step(cnn, cnn, learning.optimizer(cnn, Training(learning_rate=1e-3)), loss=loss)

    totals = list(learning.train_epoch(step, [learning.Batch(data, 1 / 4)] * 1500))

    predicted_B = cnn.train()(data.image_BHW, data.num_subhalos_B).detach()  # as it was trained
    assert predicted_B.tolist() == pytest.approx([best] * 4, abs=0.2)
    error_B = predicted_B - target_B
    assert float(totals[-1]) == pytest.approx(
        float((error_B.square() if loss == "mse" else error_B.abs()).sum()), rel=0.2
    )


def test_only_the_networks_arithmetic_is_rounded_to_bfloat16():
    """Weights that were rounded would lose small steps, and a rounded prediction would be another measure."""
    errors, cnns = [], []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        cnns.append(network("n-cnn", SMALL, num_pixels=12))
        step = learning.Step(cnns[-1], cnns[-1], learning.optimizer(cnns[-1], TRAINING), precision=precision)
        errors.append(step(learning.Batch(block(8), 1 / 8)))

    assert errors[0] != errors[1] == pytest.approx(float(errors[0]), rel=0.02)
    assert errors[1].dtype == torch.float32
    assert {value.dtype for value in cnns[1].state_dict().values()} == {torch.float32, torch.int64}
    assert learning.predict(cnns[1], *block(8)[:2]).dtype == torch.float32


class Trained:
    """A network in training, on some device and under some setting, with the errors of its steps so far."""

    def __init__(self, device: str, *, graph: bool, training: Training = TRAINING, model: Model = WITH_CHANCE) -> None:
        torch.manual_seed(0)
        self.training, self.device = training, torch.device(device)
        self.cnn = learning.on_device(network("alpha-cnn", model, num_pixels=12), self.device)
        self.steps = learning.optimizer(self.cnn, training)
        self.step = learning.Step(self.cnn, self.cnn, self.steps, precision=training.precision, graph=graph)

    def epoch(self, epoch: int, first: int = 0, seeded: bool = True) -> list[float]:
        """Return the errors of an epoch's steps, from one on."""
        learning.set_learning_rate(self.steps, self.training, epoch)
        if seeded:
            torch.manual_seed(epoch)
        return torch.stack(list(learning.train_epoch(self.step, self.batches(first)))).tolist()

    def batches(self, first: int) -> Iterator[learning.Batch]:
        """Sixteen images a step, in one step fifteen, and seven in the last."""
        data = block(102)
        bounds = [0, 16, 31, 47, 63, 79, 95, 102]
        for start, end in list(pairwise(bounds))[first:]:
            rows = learning.Block(*(column.to(self.device) for column in data.take(slice(start, end))))
            yield learning.Batch(rows, 1 / (end - start))


@pytest.fixture
def to_the_digit(monkeypatch) -> None:
    """As in the workers: cuDNN adds in a fixed order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
@pytest.mark.parametrize("filters", [[4, 8], [16, 32]])
def test_a_training_goes_on_from_a_checkpoint_to_the_digit(
    tmp_path, to_the_digit, device, precision, optimizer, filters
):
    """Weights, moments and random numbers are in it, wherever they were, and captured steps begin anew."""
    training = TRAINING.override({"precision": precision, "optimizer": optimizer})
    model = WITH_CHANCE.override({"filters": filters})
    whole, begun = (Trained(device, graph=device == "cuda", training=training, model=model) for _ in range(2))
    errors = [whole.epoch(epoch) for epoch in (1, 2, 3)]
    for epoch in (1, 2):
        begun.epoch(epoch)
    learning.set_learning_rate(begun.steps, training, 3)
    torch.manual_seed(3)
    first = [begun.step(batch).item() for _, batch in zip(range(4), begun.batches(0), strict=False)]
    checkpoint.save(str(tmp_path), begun.cnn, begun.steps, Position(world_size=1, step=4))
    checkpoint.save_random_state(str(tmp_path), 0)
    torch.manual_seed(99)

    resumed = Trained(device, graph=device == "cuda", training=training, model=model)
    position = checkpoint.restore(str(tmp_path), resumed.cnn, resumed.steps, rank=0, world_size=1)
    rest = resumed.epoch(3, position.step, seeded=False)

    assert first + rest == errors[2]
    for name, value in whole.cnn.state_dict().items():
        assert torch.equal(value, resumed.cnn.state_dict()[name]), name


def test_a_checkpoint_holds_weights_and_moments_whatever_their_layout(tmp_path):
    """A fused optimiser reads a moment in the order of its parameter's memory, and safetensors know one order only."""
    torch.manual_seed(0)
    cnn, other = (network("n-cnn", WITH_CHANCE, num_pixels=12).to(memory_format=torch.channels_last) for _ in "ab")
    steps, others = (learning.optimizer(one, TRAINING) for one in (cnn, other))
    batch = learning.Batch(block(8), 1 / 8)
    take, take_other = learning.Step(cnn, cnn, steps), learning.Step(other, other, others)
    for _ in range(3):
        take(batch)

    checkpoint.save(str(tmp_path), cnn, steps, Position(world_size=1))
    checkpoint.restore(str(tmp_path), other, others, rank=0, world_size=1)

    assert not cnn.features[5].weight.is_contiguous()
    errors = []
    for step in (take, take_other):
        torch.manual_seed(1)
        errors.append([step(batch).item() for _ in range(3)])
    assert errors[0] == errors[1]


def test_numbers_that_are_all_but_zero_are_zero_in_every_thread():
    """Moments decay to them, and a network with many idle weights then trains at half its rate."""

    def nonzero() -> None:
        learning.compute_with(2)
        counts.append(int((torch.full((1 << 20,), 1e-39) * 0.5).view(torch.int32).count_nonzero()))

    counts: list[int] = []
    num_threads = torch.get_num_threads()
    thread = threading.Thread(target=nonzero)
    thread.start()
    thread.join()
    torch.set_num_threads(num_threads)

    assert counts == [0]


@pytest.mark.parametrize(("filters", "last"), [([16, 32], True), ([8, 16], False)])
def test_where_the_channels_lie_changes_no_result(filters, last):
    """On a CPU they lie last where they fill vectors."""
    cnns = []
    for laid_out in (True, False):
        torch.manual_seed(0)
        cnn = network("alpha-cnn", SMALL.override({"filters": filters}), num_pixels=12)
        cnns.append(learning.on_device(cnn, torch.device("cpu")) if laid_out else cnn)
    assert cnns[0].features[5].weight.is_contiguous() is not last

    errors = []
    for cnn in cnns:
        step = learning.Step(cnn, cnn, learning.optimizer(cnn, TRAINING))
        errors.append([step(learning.Batch(block(32), 1 / 32)).item() for _ in range(5)])
    predictions = [learning.predict(cnn, *block(32)[:2]) for cnn in cnns]

    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert torch.allclose(*predictions, rtol=1e-3, atol=1e-4)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "nadam"])
def test_captured_steps_are_the_steps(to_the_digit, precision, optimizer):
    """The same dropout, rates and updates, whatever number of images a step has, over epochs; only sooner."""
    training = TRAINING.override({"precision": precision, "optimizer": optimizer})
    captured, eager = (Trained("cuda", graph=graph, training=training) for graph in (True, False))

    errors = [[one.epoch(epoch) for epoch in (1, 2, 3)] for one in (captured, eager)]

    torch.testing.assert_close(torch.tensor(errors[0]), torch.tensor(errors[1]), rtol=1e-3, atol=0)
    for name, value in eager.cnn.state_dict().items():
        torch.testing.assert_close(captured.cnn.state_dict()[name], value, rtol=1e-2, atol=1e-3, msg=name)


@needs_gpu
def test_a_captured_step_takes_a_new_learning_rate():
    """A rate that was captured as a number would stay for ever."""
    trained = Trained("cuda", graph=True)
    trained.epoch(1)
    before = trained.cnn.head.weight.clone()

    trained.epoch(2)
    between = trained.cnn.head.weight.clone()
    trained.epoch(TRAINING.num_epochs + 1)  # the cosine's end, where the rate is zero

    assert not torch.equal(before, between)
    assert torch.equal(between, trained.cnn.head.weight)


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
    cnn.target = models.Scaling(offset=380.0, scale=170.0)
    data = block(600)

    sums = Sums.of(*learning.validate(cnn, [data.take(slice(0, 17)), data.take(slice(17, None))]))
    predicted_B = learning.predict(cnn, data.image_BHW, data.num_subhalos_B)

    assert sums.num_images == 600
    error_B = predicted_B - data.target_B
    assert sums.rmse == pytest.approx(float(error_B.square().mean().sqrt()), rel=1e-5)
    assert learning.loss_of(sums, cnn, "mse") == pytest.approx(float((error_B / 170).square().mean()), rel=1e-5)
    assert learning.loss_of(sums, cnn, "mae") == pytest.approx(float((error_B / 170).abs().mean()), rel=1e-5)
