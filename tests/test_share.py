"""Each image once an epoch, on whichever rank, in memory or streamed; what does not fit is streamed."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylens import share
from raylens.config import Simulation
from raylens.dataset import Dataset

CPU = torch.device("cpu")
SIMULATION = Simulation().override({"camera.num_pixels": 6, "camera.pixel_scale": 1.0, "camera.psf_sigma": 0.0})
NUM_IMAGES, SHARD_SIZE = 37, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_dataset) -> Dataset:
    uri = make_dataset(tmp_path_factory.mktemp("data"), SIMULATION, num_images=NUM_IMAGES, shard_size=SHARD_SIZE)
    return Dataset.open(uri)


@pytest.fixture(scope="module")
def alpha(data) -> np.ndarray:
    """Different for each image, so it names them."""
    values = data.read(["alpha"])["alpha"]
    assert len(set(values)) == NUM_IMAGES
    return values


def held(data, used, rank, world_size, *, streamed: bool) -> share.Resident | share.Streamed:
    parts = share.parts_of(data.parts, used, rank=rank, world_size=world_size)
    if streamed:
        return share.Streamed(parts, "alpha", CPU, num_at_once=12)
    return share.Resident(share.read(parts, "alpha", CPU))


def seen(batches) -> list[float]:
    return [value for rows, _ in batches for value in rows.target_B.tolist()]


@pytest.mark.parametrize("streamed", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    world_size=st.integers(1, 5), batch_size=st.integers(2, 40), num_unused=st.integers(0, 31), seed=st.integers(0, 9)
)
def test_an_epoch_sees_every_image_once(data, alpha, streamed, world_size, batch_size, num_unused, seed):
    """Awkward numbers of images, ranks and batches: none is lost, none comes twice, and no rank waits for another."""
    used = np.ones(NUM_IMAGES, bool)
    used[np.random.default_rng(seed).choice(NUM_IMAGES, num_unused, replace=False)] = False
    values, num_steps, weights = [], set(), []
    for rank in range(world_size):
        epoch = share.Epoch(int(used.sum()), batch_size, rank, world_size)
        batches = list(held(data, used, rank, world_size, streamed=streamed).batches(epoch, seed))
        num_steps.add(len(batches))
        assert all(0 < len(rows.target_B) <= -(-2 * batch_size // world_size) + 1 for rows, _ in batches)
        weights.append([weight * len(rows.target_B) / world_size for rows, weight in batches])
        values += seen(batches)

    assert sorted(values) == sorted(alpha[used].tolist())
    assert num_steps == {epoch.num_steps}
    # The mean over ranks of their losses is the mean over the images of a step.
    np.testing.assert_allclose(np.sum(weights, axis=0), 1)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_order_is_another_in_each_epoch_and_the_same_for_a_seed(data, alpha, streamed):
    """A resumed epoch must be the one that was begun, and two epochs must not be alike."""
    epoch = share.Epoch(NUM_IMAGES, 4, 0, 1)
    mine = held(data, np.ones(NUM_IMAGES, bool), 0, 1, streamed=streamed)

    first, again, other = (seen(mine.batches(epoch, seed)) for seed in (1, 1, 2))

    assert first == again != other != alpha.tolist() != first


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("step", [1, 4, 9])
def test_an_epoch_goes_on_from_any_step(data, streamed, step):
    """A run that was killed repeats no image and leaves none out."""
    epoch = share.Epoch(NUM_IMAGES, 4, 0, 1)
    mine = held(data, np.ones(NUM_IMAGES, bool), 0, 1, streamed=streamed)

    assert seen(mine.batches(epoch, 7, step)) == seen(list(mine.batches(epoch, 7))[step:])


def test_streaming_mixes_rows_of_several_shards(data, alpha):
    """A batch from one shard alone would be shuffled less than it seems."""
    shard_of = {value: row // SHARD_SIZE for row, value in enumerate(alpha.tolist())}
    mine = held(data, np.ones(NUM_IMAGES, bool), 0, 1, streamed=True)

    neighbours = set()
    for seed in range(40):
        for rows, _ in mine.batches(share.Epoch(NUM_IMAGES, 4, 0, 1), seed):
            shards = [shard_of[value] for value in rows.target_B.tolist()]
            neighbours |= {(one, other) for one in shards for other in shards if one < other}

    num_shards = -(-NUM_IMAGES // SHARD_SIZE)
    assert len(neighbours) == num_shards * (num_shards - 1) // 2  # each with each


def test_what_fits_is_kept_and_what_does_not_is_streamed(data):
    """By the bytes of the pixels."""
    parts = share.parts_of(data.parts, np.ones(NUM_IMAGES, bool), rank=0, world_size=1)
    size = 4 * 36 * NUM_IMAGES

    kept, streamed = (share.hold(parts, "alpha", CPU, num_pixels=6, room=room) for room in (size, size - 1))

    assert (type(kept), type(streamed)) == (share.Resident, share.Streamed)
    for one, other in zip(zip(*kept.blocks(), strict=True), zip(*streamed.blocks(), strict=True), strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))


def test_an_image_that_is_not_finite_is_named(tmp_path, data):
    """It would turn every weight into NaN."""
    table = pq.read_table(data.parts[1][0])
    pixels = np.array(table["image"].combine_chunks().flatten().flatten())
    pixels[36 * 3 + 2] = np.inf
    column = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(pa.array(pixels), 6), 6)
    place = str(tmp_path / "part.parquet")
    pq.write_table(table.set_column(table.column_names.index("image"), "image", column), place)

    with pytest.raises(ValueError, match="image, of index 8, with pixels that are not finite"):
        share.Part(place, np.arange(5)).read("alpha")
    assert len(share.Part(place, np.array([0, 1, 2, 4])).read("num_subhalos").target_B) == 4
