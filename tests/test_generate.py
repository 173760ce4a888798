"""A dataset does not tell how it was made: by how many, in how many runs, on which storage."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylens import dataset, generate, shards, storage
from raylens.config import Experiment, Simulation
from raylens.dataset import Dataset
from raylens.simulate import simulate_block


@pytest.fixture(scope="module")
def simulation(tiny) -> Simulation:
    """With the subhaloes one by one."""
    return tiny.override({"output.catalogue": True})


def simulate(
    simulation: Simulation, root: Path | str, num_images: int = 10, shard_size: int = 4, **options
) -> generate.Simulated:
    return generate.simulate(
        simulation, str(root), recipe="tiny", num_images=num_images, shard_size=shard_size, **options
    )


@pytest.fixture(scope="module")
def made(simulation, tmp_path_factory, ray_cluster) -> Path:
    """Ten images in shards of four, four and two, by two CPUs and in one go."""
    return Path(simulate(simulation, tmp_path_factory.mktemp("made")).dataset)


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(made, tmp_path / made.name)


def contents(uri: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(uri).glob("*.parquet")}


def read(uri: Path | str) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted(Path(uri).glob("*.parquet")))


def changed(uri: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in uri.iterdir()}


def test_a_dataset_is_complete_and_sound(made):
    """The rest of this file compares with it."""
    assert dataset.verify(str(made)) == []
    assert [shard.rows for shard in Dataset.open(str(made)).manifest.shards] == [4, 4, 2]


def test_one_cpu_makes_the_same_bytes_as_two(made, simulation, cli, tmp_path):
    """Otherwise a result could not be made again elsewhere."""
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps(Experiment(name="tiny", simulation=simulation).as_dict()))

    ran = cli(
        "simulate", str(recipe), "--to", str(tmp_path), "--num-images", "10", "--shard-size", "4",
        RAY_OVERRIDE_RESOURCES='{"CPU": 1}',
    )  # fmt: skip

    assert ran.returncode == 0, ran.stderr
    assert contents(ran.facts["dataset"]) == contents(made)
    assert Path(ran.facts["dataset"], "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()


def test_a_row_is_what_its_index_makes_of_it_alone(made, simulation):
    """So that any image of a training set can be made again without the others, whatever its shard and block."""
    table = read(made)
    images = shards.images(table)

    for index in range(10):
        alone = simulate_block(simulation, [index])
        np.testing.assert_array_equal(images[index], alone["image"][0])
        for name in table.column_names:
            if name in shards.CATALOGUE:
                assert table[name][index].as_py() == alone[name].tolist()
            elif name != "image":
                assert table[name][index].as_py() == alone[name][0]


def test_subhaloes_are_as_many_and_as_heavy_as_the_row_says(made):
    """A catalogue shifted by one row would still look like a catalogue."""
    rows = read(made).to_pylist()

    assert len(rows) == 10
    for row in rows:
        assert {len(row[name]) for name in shards.CATALOGUE} == {row["num_subhalos"]}
        assert sum(row["subhalos_mass"]) == pytest.approx(row["subhalo_mass"], rel=1e-12)
        assert sum(row["subhalos_theta_E"]) == pytest.approx(row["subhalo_theta_E"], rel=1e-12)


def test_a_shard_of_many_blocks_is_cut_nowhere(tiny, tmp_path, ray_cluster):
    """A task simulates a shard in blocks of 128, which must neither show in the rows nor in what is found sound."""
    uri = simulate(tiny, tmp_path, num_images=150, shard_size=150).dataset
    os.remove(f"{uri}/manifest.json")

    again = simulate(tiny, tmp_path, num_images=150, shard_size=150)

    assert again.num_made == 0
    expected = simulate_block(tiny, [126, 127, 128, 129])
    table = read(uri).slice(126, 4)
    np.testing.assert_array_equal(shards.images(table), expected["image"])
    np.testing.assert_array_equal(table["index"].to_numpy(), expected["index"])


def test_a_second_run_makes_nothing_and_touches_nothing(copy, simulation, ray_cluster):
    """Submitting again is how one continues, and others may be reading."""
    before = changed(copy)

    again = simulate(simulation, copy.parent)

    assert (again.num_made, again.num_skipped, again.num_shards) == (0, 3, 3)
    assert changed(copy) == before


def test_a_lost_shard_is_made_again_and_the_others_are_kept(copy, made, simulation, ray_cluster):
    """The same bytes, so that the manifest still holds."""
    before = changed(copy)
    (copy / "part-00001.parquet").unlink()

    again = simulate(simulation, copy.parent)

    assert (again.num_made, again.num_skipped) == (1, 2)
    assert contents(copy) == contents(made)
    assert dataset.verify(str(copy)) == []
    assert changed(copy)["part-00000.parquet"] == before["part-00000.parquet"]


def test_a_damaged_shard_is_made_again(copy, made, simulation, ray_cluster):
    """One flipped bit in a pixel is enough."""
    path = copy / "part-00002.parquet"
    content = bytearray(path.read_bytes())
    content[pq.read_metadata(path).row_group(0).column(1).data_page_offset + 200] ^= 1
    path.write_bytes(content)

    again = simulate(simulation, copy.parent)

    assert (again.num_made, again.num_skipped) == (1, 2)
    assert contents(copy) == contents(made)


def test_an_interrupted_run_is_finished_and_its_shards_are_kept(copy, made, simulation, ray_cluster):
    """The hours before the interruption are not paid for twice."""
    (copy / "manifest.json").unlink()
    (copy / "README.md").unlink()
    (copy / "part-00002.parquet").unlink()
    before = changed(copy)

    again = simulate(simulation, copy.parent)

    assert (again.num_made, again.num_skipped) == (1, 2)
    assert contents(copy) == contents(made)
    assert dataset.verify(str(copy)) == []
    assert {
        name: changed(copy)[name] for name in ("part-00000.parquet", "part-00001.parquet")
    }.items() <= before.items()


def test_damage_in_an_interrupted_run_is_not_sealed(copy, made, simulation, ray_cluster):
    """Without a manifest only the shard itself can tell; finishing must not make the damage official."""
    (copy / "manifest.json").unlink()
    path = copy / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-20])

    again = simulate(simulation, copy.parent)

    assert (again.num_made, again.num_skipped) == (1, 2)
    assert contents(copy) == contents(made)


def test_more_images_remake_the_short_last_shard_and_add_to_it(copy, simulation, ray_cluster, tmp_path):
    """A dataset that grew is the dataset that was made large at once."""
    before = changed(copy)

    grown = simulate(simulation, copy.parent, num_images=13)

    at_once = simulate(simulation, tmp_path / "at-once", num_images=13)
    assert (grown.num_made, grown.num_skipped, grown.num_shards) == (2, 2, 4)
    assert contents(copy) == contents(at_once.dataset)
    assert dataset.verify(str(copy)) == []
    assert Dataset.open(str(copy)).num_images == 13
    assert "13 simulated" in (copy / "README.md").read_text()
    for name in ("part-00000.parquet", "part-00001.parquet"):
        assert changed(copy)[name] == before[name]


def test_fewer_images_are_met_by_what_stands(copy, simulation, ray_cluster):
    """Nothing is deleted, and the facts say how many there are."""
    before = changed(copy)

    again = simulate(simulation, copy.parent, num_images=5)

    assert (again.num_images, again.num_made) == (10, 0)
    assert changed(copy) == before


def test_progress_ends_with_all_images(simulation, tmp_path, ray_cluster):
    """A bar that stops at 98 % makes people wait."""
    told = []

    simulate(simulation, tmp_path, progress=lambda done, total, detail: told.append((done, total)))

    assert [total for _, total in told] == [10, 10, 10]
    assert sorted(done for done, _ in told) == [done for done, _ in told]
    assert told[-1] == (10, 10)


def test_both_engines_can_be_chosen_and_agree(tiny, tmp_path, ray_cluster):
    """lenstronomy is the reference: whoever doubts our kernel makes the same dataset with it."""
    exposure = {"camera.signal_to_noise": None, "camera.num_pixels": 24, "camera.pixel_scale": 0.25}
    images = {}
    for engine in ("numba", "lenstronomy"):
        made = simulate(tiny.override({"engine": engine, **exposure}), tmp_path)
        images[engine] = shards.images(read(made.dataset))

    assert len(os.listdir(tmp_path)) == 2  # the digest tells them apart
    assert not np.array_equal(images["numba"], images["lenstronomy"])  # or the choice had no effect
    np.testing.assert_allclose(images["numba"], images["lenstronomy"], atol=2e-4)


def test_a_dataset_on_s3_is_the_one_on_disk(made, simulation, s3, ray_cluster):
    """Made by workers that write to S3 themselves, verified, and read back, with nothing local."""
    simulated = simulate(simulation, f"{s3}/data")
    again = simulate(simulation, f"{s3}/data")

    assert simulated.dataset == f"{s3}/data/{made.name}"
    assert (simulated.num_made, again.num_made) == (3, 0)
    assert dataset.verify(simulated.dataset) == []
    assert storage.names(simulated.dataset) == {path.name for path in made.iterdir()}
    for name, content in contents(made).items():
        assert storage.read(storage.join(simulated.dataset, name)) == content
    there, here = Dataset.open(simulated.dataset), Dataset.open(str(made))
    for name, values in there.read(["index", "num_subhalos", "subhalo_mass"]).items():
        np.testing.assert_array_equal(values, here.read([name])[name])


def test_a_lost_shard_on_s3_is_made_again(simulation, made, s3, ray_cluster):
    """Resuming from object storage is what saves the work when a cluster goes."""
    uri = simulate(simulation, f"{s3}/lost").dataset
    storage.remove(storage.join(uri, "part-00001.parquet"))
    assert dataset.verify(uri) == ["part-00001.parquet is missing"]

    again = simulate(simulation, f"{s3}/lost")

    assert (again.num_made, again.num_skipped) == (1, 2)
    assert storage.read(storage.join(uri, "part-00001.parquet")) == contents(made)["part-00001.parquet"]


def test_a_simulation_that_cannot_be_drawn_leaves_nothing(tiny, tmp_path):
    """It is refused before a folder is made, and before Ray is started."""
    with pytest.raises(ValueError, match=r"subhaloes.*raise subhalos\.mass_min"):
        simulate(tiny.override({"subhalos.mass_min": 1.0}), tmp_path / "root")

    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_anything_else(simulation, tmp_path):
    """Not by the first worker after the cluster came up."""
    (tmp_path / "file").write_text("x")

    with pytest.raises(storage.StorageError, match="cannot be written"):
        simulate(simulation, tmp_path / "file" / "below")

    assert storage.names(str(tmp_path)) == {"file"}


def test_what_was_spent_is_reported(simulation, tmp_path, ray_cluster):
    """Every verb that computes reports its cost."""
    cost = simulate(simulation, tmp_path)

    assert 0 < cost.cpu_seconds < 2 * cost.seconds
    assert cost.images_per_second == pytest.approx(10 / cost.seconds)
