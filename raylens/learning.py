"""One epoch of training and one pass of validation, in plain torch, over any iterable of batches or blocks.

A block is what a dataset gives at once: tensors image_BHW float32, num_subhalos_B and target_B
float32, on the device of the model, in the units of the dataset. `share` cuts batches from them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raylens.config import Loss, Precision, Training
from raylens.metrics import Sums
from raylens.models import CNN

# Images in a pass without gradients; on a CPU the layers of more would not stay in its caches.
_NUM_AT_ONCE_GPU, _NUM_AT_ONCE_CPU = 512, 64
_NUM_LANES = 16  # floats that a CPU computes at once (AVX-512)
_NUM_STEPS_BEFORE_CAPTURE = 3  # in which libraries choose their kernels, and the optimiser makes its state


class Block(NamedTuple):
    """Images and truth of some rows."""

    image_BHW: Tensor
    num_subhalos_B: Tensor
    target_B: Tensor

    def take(self, rows: Tensor | slice) -> Block:
        """Return some rows."""
        return Block(*(tensor[rows] for tensor in self))


class Batch(NamedTuple):
    """The rows of a step, and what the error of one counts in its loss: for one worker one over the number of rows."""

    rows: Block
    weight: float


def compute_with(num_threads: int) -> None:
    """Set how many threads this thread computes with, before it does, and that numbers below 1e-38 are zero to them.

    The moments of weights whose gradient has become zero shrink to such numbers within a thousand
    steps, and stay there; a CPU takes many times as long for them.
    """
    torch.set_num_threads(num_threads)
    torch.set_flush_denormal(True)


def on_device(network: CNN, device: torch.device) -> CNN:
    """Return the network where it is trained, and laid out with its channels last where that is faster."""
    # On a GPU up to three times. On a CPU by a quarter, but where a vector is not full torch's batch normalisation is
    # several times slower.
    if device.type == "cuda" or all(num % _NUM_LANES == 0 for num in network.num_filters):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # documented, not in the stubs
    return network.to(device)


def optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Return the optimiser of a training, in torch's fastest form of it; on a GPU one that a CUDA graph can hold."""
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    # A graph remembers addresses, so that the learning rate has one there.
    rate = torch.tensor(training.learning_rate, device=device) if on_gpu else training.learning_rate
    if training.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), rate, fused=True, capturable=on_gpu)
    return torch.optim.NAdam(model.parameters(), rate, foreach=True, capturable=on_gpu)


def learning_rate(training: Training, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1."""
    if training.schedule == "cosine":
        return training.learning_rate * ((1 + math.cos(math.pi * (epoch - 1) / training.num_epochs)) / 2)
    return training.learning_rate


def set_learning_rate(steps: torch.optim.Optimizer, training: Training, epoch: int) -> None:
    """Give the optimiser the learning rate of an epoch, counted from 1."""
    rate = learning_rate(training, epoch)
    for group in steps.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def no_longer_improves(history: list[dict[str, Any]], training: Training) -> bool:
    """Return whether an epoch's validation loss has been the lowest for as long as a training has patience."""
    if training.patience is None or not history:
        return False
    best = min(history, key=lambda record: record["validation_loss"])
    return bool(history[-1]["epoch"] - best["epoch"] >= training.patience)


class Step:
    """A step of training: takes a batch, changes the weights, returns the sum over its rows of what the loss averages.

    The mean squared error is eq. 2.4, of the scaled target.

    Parameters
    ----------
    model
        The network, or what distributes it.
    network
        The network itself, on its device (`on_device`).
    steps
        Its optimiser, into which a checkpoint, if there is one, has been restored.
    loss
        Of the scaled target.
    precision
        bfloat16: of the network's arithmetic where that loses little; weights, loss and optimiser stay float32.
    graph
        Whether steps are captured as CUDA graphs: for a GPU whose steps wait for no other worker.
    """

    def __init__(
        self,
        model: nn.Module,
        network: CNN,
        steps: torch.optim.Optimizer,
        *,
        loss: Loss = "mse",
        precision: Precision = "float32",
        graph: bool = False,
    ) -> None:
        self.model, self._network, self._steps, self._loss = model, network, steps, loss
        device = next(network.parameters()).device
        # Each weight is used once, so that a cache of those cast would only take memory.
        self._autocast = torch.autocast(
            device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False
        )
        self._graphs = _Graphs(self._compute, device) if graph else None

    def __call__(self, batch: Batch) -> Tensor:
        return self._graphs(batch) if self._graphs else self._compute(batch)

    def _compute(self, batch: Batch) -> Tensor:
        rows, weight = batch
        with self._autocast:
            prediction_B = self.model(rows.image_BHW, rows.num_subhalos_B)
        error_B = prediction_B - self._network.scaled(rows.target_B)
        total = (error_B.square() if self._loss == "mse" else error_B.abs()).sum()
        self._steps.zero_grad()
        (total * weight).backward()
        self._steps.step()
        return total.detach()


class _Graphs:
    """A computation on batches as CUDA graphs, since launching small kernels one by one can take longer than they run.

    There is a graph for each number of rows, of which an epoch has two at most (`share.Epoch`). The
    first batches of a number are computed as they are, and count like any other; then one is
    captured, and it and all that follow are replayed, with the same kernels and random numbers.
    """

    def __init__(self, compute: Callable[[Batch], Tensor], device: torch.device) -> None:
        self._compute = compute
        self._stream = torch.cuda.Stream(device)  # captures cannot be on the default one, and the first steps are alike
        self._pool = torch.cuda.graph_pool_handle()  # one replays at a time, so that they share their memory
        self._num_computed: Counter[tuple[int, float]] = Counter()
        self._captured: dict[tuple[int, float], tuple[torch.cuda.CUDAGraph, Block, Tensor]] = {}

    def __call__(self, batch: Batch) -> Tensor:
        kind = (len(batch.rows.target_B), batch.weight)
        if kind not in self._captured:
            if self._num_computed[kind] < _NUM_STEPS_BEFORE_CAPTURE:
                self._num_computed[kind] += 1
                return self._compute_aside(batch)
            self._captured[kind] = self._capture(batch)
        graph, rows, result = self._captured[kind]
        for held, column in zip(rows, batch.rows, strict=True):
            held.copy_(column)
        graph.replay()
        return result.clone()  # the next replay writes there again

    def _compute_aside(self, batch: Batch) -> Tensor:
        main = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            result = self._compute(batch)
        main.wait_stream(self._stream)
        return result

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Block, Tensor]:
        """Return a graph, where it reads its rows, and where it writes its result; nothing is computed yet."""
        rows = Block(*(column.clone() for column in batch.rows))
        graph = torch.cuda.CUDAGraph()
        # Other threads (Ray's, NCCL's) may call what a capturing one must not.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = self._compute(Batch(rows, batch.weight))
        return graph, rows, result


def train_epoch(step: Step, batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Take a step for each batch; yield what it returns, on the model's device."""
    step.model.train()
    for batch in batches:
        yield step(batch)


@torch.inference_mode()
def predict(network: CNN, image_BHW: Tensor, num_subhalos_B: Tensor) -> Tensor:
    """Return the predicted target (B,) in the units of the dataset."""
    network.eval()
    num_at_once = _NUM_AT_ONCE_GPU if image_BHW.is_cuda else _NUM_AT_ONCE_CPU
    pairs = zip(image_BHW.split(num_at_once), num_subhalos_B.split(num_at_once), strict=True)
    return torch.cat([network.in_units(network(image, num_subhalos)) for image, num_subhalos in pairs])


def loss_of(sums: Sums, network: CNN, loss: Loss) -> float:
    """Return the loss of predictions in the units of the dataset, as steps of training count it."""
    scale = network.target.scale
    return (sums.rmse / scale) ** 2 if loss == "mse" else sums.mae / scale


def validate(network: CNN, blocks: Iterable[Block]) -> tuple[Tensor, Tensor]:
    """Return true and predicted target of all rows (B,), in the units of the dataset, on the CPU."""
    true, predicted = [torch.empty(0)], [torch.empty(0)]
    for block in blocks:
        true.append(block.target_B.cpu())
        predicted.append(predict(network, block.image_BHW, block.num_subhalos_B).cpu())
    return torch.cat(true), torch.cat(predicted)
