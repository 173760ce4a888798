"""A worker's share of a dataset as shuffled batches: kept in memory, or streamed where it does not fit.

Ranks take runs of the rows in their order, so that each reads its own shards only, and all take
the same number of steps, whatever the numbers of images, workers and images a step are. What an
epoch does follows from its seed alone, so that it can be taken up again at any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from raylens import shards
from raylens.learning import Batch, Block

_NUM_READERS = 4  # shards read at once; reading waits for storage more than it computes


@dataclass(frozen=True)
class Part:
    """Rows of one shard."""

    uri: str
    rows: np.ndarray  # positions within the shard, increasing

    def read(self, target: str) -> Block:
        """Return the rows, in their order.

        Raises
        ------
        ValueError
            If an image holds a value that is not finite.
        """
        table = shards.read(self.uri, ["index", "image", *{"num_subhalos", target}])
        images = shards.images(table)[self.rows]
        finite = np.isfinite(images.sum(axis=(1, 2)))
        if not finite.all():
            index = table["index"].to_numpy()[self.rows][~finite][0]
            raise ValueError(f"{self.uri} holds an image, of index {index}, with pixels that are not finite numbers.")
        columns = (images, table["num_subhalos"].to_numpy()[self.rows], table[target].to_numpy()[self.rows])
        return Block(*(torch.from_numpy(np.asarray(column, np.float32)) for column in columns))


def parts_of(parts: list[tuple[str, int]], used: np.ndarray, *, rank: int, world_size: int) -> list[Part]:
    """Return a rank's share of the rows of a dataset that are used.

    Parameters
    ----------
    parts
        Each shard's URI and number of rows (`Dataset.parts`).
    used
        For each row of the dataset, whether it is used; bool (images,).
    """
    chosen = np.flatnonzero(used)
    mine = chosen[rank * len(chosen) // world_size : (rank + 1) * len(chosen) // world_size]
    starts = np.cumsum([0] + [num_rows for _, num_rows in parts])
    bounds = np.searchsorted(mine, starts)
    return [
        Part(uri, mine[first:last] - start)
        for (uri, _), start, first, last in zip(parts, starts[:-1], bounds[:-1], bounds[1:], strict=True)
        if last > first
    ]


@dataclass(frozen=True)
class Epoch:
    """How many images each rank gives to each step of an epoch."""

    num_images: int  # of all ranks
    batch_size: int  # images a step, of all ranks
    rank: int
    world_size: int

    @property
    def num_steps(self) -> int:
        """The same on all ranks, and each rank has an image for each of them."""
        return max(min(-(-self.num_images // self.batch_size), self.num_images // self.world_size), 1)

    def bound(self, step: int, rank: int | None = None) -> int:
        """Return how many images a rank (this one) has seen before a step."""
        rank = self.rank if rank is None else rank
        num_mine = (rank + 1) * self.num_images // self.world_size - rank * self.num_images // self.world_size
        return step * num_mine // self.num_steps

    def weight(self, step: int) -> float:
        """Return what a squared error counts in a rank's loss, so that the mean over ranks is that over images."""
        num_of_all = sum(self.bound(step + 1, rank) - self.bound(step, rank) for rank in range(self.world_size))
        return self.world_size / num_of_all


class Resident:
    """A share that is kept in memory, or on the GPU; None: of no rows."""

    def __init__(self, block: Block | None) -> None:
        self.block = block

    def blocks(self) -> Iterator[Block]:
        """Yield all rows, in their order."""
        if self.block is not None:
            yield self.block

    def batches(self, epoch: Epoch, seed: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from a step on: all rows once, in an order that the seed decides."""
        assert self.block is not None
        order = torch.randperm(len(self.block.target_B), generator=_generator(seed)).to(self.block.target_B.device)
        for step in range(first, epoch.num_steps):
            rows = order[epoch.bound(step) : epoch.bound(step + 1)]
            yield Batch(self.block.take(rows), epoch.weight(step))


class Streamed:
    """A share that is read anew in each epoch.

    The shards come in an order that the seed decides, some at a time, and the rows of those are
    shuffled; rows are drawn independently of each other, so a shard holds no more of one kind than
    another. While some are trained on the next are read.
    """

    def __init__(self, parts: list[Part], target: str, device: torch.device, *, num_at_once: int) -> None:
        self.parts, self.target, self.device, self.num_at_once = parts, target, device, num_at_once

    def blocks(self) -> Iterator[Block]:
        """Yield all rows, in their order, a shard at a time."""
        for part in self.parts:
            yield _on(self.device, part.read(self.target))

    def batches(self, epoch: Epoch, seed: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from a step on: all rows once, in an order that the seed decides."""
        shuffle = _generator(seed)
        step, left = 0, None
        for window in self._windows(shuffle):
            joined = window if left is None else Block(*(torch.cat(pair) for pair in zip(left, window, strict=True)))
            order = torch.randperm(len(joined.target_B), generator=shuffle)
            begun = epoch.bound(step)
            while step < epoch.num_steps and epoch.bound(step + 1) - begun <= len(order):
                if step >= first:
                    rows = order[epoch.bound(step) - begun : epoch.bound(step + 1) - begun]
                    yield Batch(_on(self.device, joined.take(rows)), epoch.weight(step))
                step += 1
            left = joined.take(order[epoch.bound(step) - begun :])

    def _windows(self, shuffle: torch.Generator) -> Iterator[Block]:
        """Yield all rows, some shards at a time; the next are read meanwhile."""
        order = torch.randperm(len(self.parts), generator=shuffle).tolist()
        windows: list[list[Part]] = []
        num_rows = self.num_at_once
        for part in (self.parts[k] for k in order):
            if num_rows + len(part.rows) > self.num_at_once:
                windows.append([])
                num_rows = 0
            windows[-1].append(part)
            num_rows += len(part.rows)
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(_NUM_READERS) as pool:

            def read(window: list[Part]) -> Block:
                blocks = list(pool.map(lambda part: part.read(self.target), window))
                return Block(*(torch.cat(column) for column in zip(*blocks, strict=True)))

            coming: Future[Block] = ahead.submit(read, windows[0])
            for following in windows[1:]:
                window, coming = coming.result(), ahead.submit(read, following)
                yield window
            yield coming.result()


def hold(parts: list[Part], target: str, device: torch.device, *, num_pixels: int, room: int) -> Resident | Streamed:
    """Return a share kept in memory if that has room for it [bytes], else streamed through that room."""
    bytes_per_image = 4 * num_pixels**2
    if sum(len(part.rows) for part in parts) * bytes_per_image <= room:
        return Resident(read(parts, target, device))
    # At one time there are the shards that are trained on, apart and joined, those that are read, and copies of rows.
    return Streamed(parts, target, device, num_at_once=room // (4 * bytes_per_image))


def read(parts: list[Part], target: str, device: torch.device) -> Block | None:
    """Return all rows of a share, in their order."""
    num_images = sum(len(part.rows) for part in parts)
    whole: Block | None = None
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        first = 0
        for block in pool.map(lambda part: part.read(target), parts):
            if whole is None:
                # Filled in place, or joining the parts would take twice the memory.
                whole = Block(*(torch.empty((num_images, *column.shape[1:]), device=device) for column in block))
            for place, column in zip(whole, block, strict=True):
                place[first : first + len(column)] = column
            first += len(block.target_B)
    return whole


def seed_of(seed: int, epoch: int, rank: int) -> int:
    """Return the seed of what a rank draws in an epoch."""
    return int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1)[0])


def _on(device: torch.device, block: Block) -> Block:
    return Block(*(column.to(device) for column in block))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
