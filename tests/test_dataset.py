"""A dataset as others read it, when it is complete, and what damage is found in it."""

import json
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raylens import dataset, shards
from raylens.config import Simulation
from raylens.simulate import simulate_block


@pytest.fixture
def simulation(tiny) -> Simulation:
    """With the subhaloes one by one, so that every column is there."""
    return tiny.override({"output.catalogue": True})


@pytest.fixture
def complete(make_dataset, simulation, tmp_path) -> str:
    """Ten images in shards of four, four and two."""
    return make_dataset(tmp_path, simulation)


def shard_path(uri: str, shard: int) -> Path:
    return Path(uri) / dataset.shard_name(shard)


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def sound(uri: str, shard: int, with_manifest: bool) -> bool:
    known = dataset.read_manifest(uri).shards[shard].sha256 if with_manifest else None
    return dataset.find_shard(uri, dataset.read_plan(uri), shard, known)[1] is not None


UNITS = {
    "index": "1", "image": "1", "num_subhalos": "1", "alpha": "1", "theta_E": "arcsec", "q": "1", "phi": "rad",
    "x": "arcsec", "y": "arcsec", "z_lens": "1", "z_source": "1", "sigma_v": "km/s", "lens_mass": "Msun",
    "subhalo_mass": "Msun", "subhalo_theta_E": "arcsec", "subhalos_x": "arcsec", "subhalos_y": "arcsec",
    "subhalos_mass": "Msun", "subhalos_theta_E": "arcsec",
}  # fmt: skip


def test_each_column_carries_its_unit(complete):
    """A number without unit is a guess; the design's contract names these columns and units."""
    schema = pq.read_schema(shard_path(complete, 0))

    assert {field.name: field.metadata[b"unit"].decode() for field in schema} == UNITS


def test_columns_have_the_types_of_the_contract(complete):
    """Others rely on them."""
    schema = pq.read_schema(shard_path(complete, 0))
    kinds = {field.name: str(field.type) for field in schema}

    assert kinds.pop("image") == ("fixed_size_list<element: fixed_size_list<element: float not null>[8] not null>[8]")
    assert {kinds.pop(name) for name in shards.CATALOGUE} == {"list<element: double not null>"}
    assert [kinds.pop(name) for name in ("index", "num_subhalos", "alpha")] == ["int64", "int32", "float"]
    assert set(kinds.values()) == {"double"}


def test_a_shard_tells_what_made_it(complete, simulation):
    """A file that somebody copied out of its folder still says which simulation and split it is."""
    about = json.loads(pq.read_schema(shard_path(complete, 0)).metadata[b"raylens"])["made_from"]

    assert Simulation.parse(about["simulation"]) == simulation
    assert about["split"] == "train"


def test_images_come_back_exactly_and_with_their_shape(complete, simulation):
    """From nested lists through a flat buffer and back: rows and columns must not change places."""
    read = shards.images(pq.read_table(shard_path(complete, 1)))

    np.testing.assert_array_equal(read, simulate_block(simulation, range(4, 8))["image"])
    assert read.dtype == np.float32


def test_images_of_slices_and_of_no_rows_have_their_shape(complete):
    """Ray Data hands out slices of tables, and a filter may leave no row."""
    table = pq.read_table(shard_path(complete, 0))

    np.testing.assert_array_equal(shards.images(table.slice(1, 2)), shards.images(table)[1:3])
    assert shards.images(table.slice(0, 0)).shape == (0, 8, 8)
    assert shards.images(table.schema.empty_table()).shape == (0, 8, 8)


def test_columns_of_the_whole_dataset_come_in_the_order_of_the_rows(complete, simulation):
    """Labels and baselines are matched to rows by this order."""
    read = dataset.Dataset.open(complete).read(["index", "num_subhalos", "lens_mass"])

    rows = simulate_block(simulation, range(10))
    for name, values in read.items():
        np.testing.assert_array_equal(values, rows[name])


def test_the_first_rows_of_a_dataset_can_be_opened_alone(complete):
    """A smaller experiment must not be done on all that happens to stand."""
    whole, first = dataset.Dataset.open(complete), dataset.Dataset.open(complete, 6)

    assert first.num_images == 6
    assert [rows for _, rows in first.parts] == [4, 2]
    np.testing.assert_array_equal(first.read(["lens_mass"])["lens_mass"], whole.read(["lens_mass"])["lens_mass"][:6])
    with pytest.raises(ValueError, match=r"holds 10 images, and 11 are asked for; `raylens .* --num-images 11`"):
        dataset.Dataset.open(complete, 11)


def test_nothing_but_shards_ends_in_parquet_and_all_lies_flat(complete):
    """Readers take *.parquet of the folder."""
    assert sorted(os.listdir(complete)) == [
        "dataset.json", "manifest.json", "part-00000.parquet", "part-00001.parquet", "part-00002.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("with_manifest", [True, False])
def test_an_undamaged_shard_is_sound(complete, with_manifest):
    """Else a run that was interrupted would begin again from nothing."""
    assert [sound(complete, shard, with_manifest) for shard in range(3)] == [True, True, True]


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize("num_left", [0, 3, 100, -1, -8])
def test_a_truncated_shard_is_refused(complete, num_left, with_manifest):
    """What a full disk, or a copy that was broken off, leaves behind."""
    path = shard_path(complete, 0)
    path.write_bytes(path.read_bytes()[:num_left])

    assert not sound(complete, 0, with_manifest)


def regions(path: Path) -> dict[str, int]:
    """Return a position in each part of a Parquet file."""
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    image = pq.read_metadata(path).row_group(0).column(1)
    return {
        "first magic": 1,
        "page header": image.data_page_offset + 8,
        "pixels": image.data_page_offset + image.total_compressed_size - 50,
        "column names": content.rindex(b"lens_mass"),
        "footer's start": len(content) - 8 - length + 1,
        "simulation in the footer": content.rindex(b'"seed"') + 8,
        "writer's name": content.rindex(b"parquet-cpp"),
        "footer's length": len(content) - 7,
        "last magic": len(content) - 2,
    }


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(
    "region",
    ["first magic", "page header", "pixels", "column names", "footer's start", "simulation in the footer",
     "writer's name", "footer's length", "last magic"],
)  # fmt: skip
def test_a_flipped_bit_is_found_in_each_part_of_a_shard(complete, region, with_manifest):
    """Pages have a checksum of their own; their headers, the schema and the footer have none."""
    flip(shard_path(complete, 0), regions(shard_path(complete, 0))[region])

    assert not sound(complete, 0, with_manifest)


def test_a_flipped_bit_is_found_wherever_it_is_without_a_manifest(complete):
    """An interrupted run has no manifest to compare with, and its next run would put its seal on the damage."""
    path = shard_path(complete, 0)
    content = path.read_bytes()

    for position in range(0, len(content), 23):
        flip(path, position, bit=position % 8)
        assert not sound(complete, 0, with_manifest=False), position
        path.write_bytes(content)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_sound_shard_in_the_wrong_place_is_refused(complete, with_manifest):
    """Its checksums hold, but its rows are others."""
    shutil.copy(shard_path(complete, 1), shard_path(complete, 0))

    assert not sound(complete, 0, with_manifest)


def test_a_shard_of_another_simulation_is_refused(complete, make_dataset, simulation, tmp_path):
    """It is somebody's data in the wrong place, not damage to be mended by writing over it."""
    other = make_dataset(tmp_path, simulation.override({"lens.theta_E": 1.4}))
    shutil.copy(shard_path(other, 0), shard_path(complete, 0))

    with pytest.raises(ValueError, match=r"another dataset: simulation\.lens\.theta_E is 1\.4 there and 1\.5"):
        sound(complete, 0, with_manifest=False)


def test_a_sound_dataset_has_no_faults(complete):
    """Otherwise the tests below would pass for the wrong reason."""
    assert dataset.verify(complete) == []


def test_verify_names_what_is_broken_missing_and_stray(complete):
    """One look must suffice to know what to mend."""
    flip(shard_path(complete, 0), 1000)
    shard_path(complete, 1).unlink()
    shutil.copy(shard_path(complete, 2), shard_path(complete, 7))

    assert dataset.verify(complete) == [
        "part-00007.parquet is not in the manifest",
        "part-00000.parquet is damaged: it is not what its checksum says",
        "part-00001.parquet is missing",
    ]


def test_verify_sees_an_interrupted_run(complete):
    """How many of how many is what a person asks first."""
    os.remove(f"{complete}/manifest.json")
    shard_path(complete, 2).unlink()

    assert dataset.verify(complete) == ["no manifest, and 2 of 3 shards: simulation did not finish"]


def test_verify_sees_that_somebody_changed_the_plan(complete):
    """The digest in the path promises what made the data."""
    plan = json.loads(Path(complete, "dataset.json").read_text())
    plan["simulation"]["lens"]["theta_E"] = 1.2
    Path(complete, "dataset.json").write_text(json.dumps(plan))

    assert "dataset.json has been changed" in dataset.verify(complete)[0]


def test_verify_sees_that_plan_and_manifest_count_differently(complete):
    """A plan that was extended by hand, or a manifest from elsewhere."""
    plan = json.loads(Path(complete, "dataset.json").read_text())
    Path(complete, "dataset.json").write_text(json.dumps(plan | {"num_images": 11}))

    assert "the manifest counts 10 images, the plan 11" in dataset.verify(complete)


def test_dataset_without_manifest_is_refused(complete):
    """Half a dataset trains as well as a whole one, and nobody would notice."""
    os.remove(f"{complete}/manifest.json")
    shard_path(complete, 2).unlink()

    with pytest.raises(ValueError, match="has 2 of 3 shards and no manifest") as refusal:
        dataset.Dataset.open(complete)

    assert str(refusal.value).startswith(complete)
    assert f"raylens simulate {complete} --to {os.path.dirname(complete)}`" in str(refusal.value)


def test_a_folder_that_is_no_dataset_is_refused(tmp_path):
    """With the command that makes one."""
    with pytest.raises(
        ValueError, match=rf"^{tmp_path} is no dataset: .* `raylens simulate RECIPE --to ROOT` makes one"
    ):
        dataset.Dataset.open(str(tmp_path))


@pytest.mark.parametrize("name", ["dataset.json", "manifest.json"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{", "is not JSON"), ("[]", "does not hold a JSON object"), ("{}", "is missing")],
)
def test_a_plan_or_manifest_that_is_none_is_refused_by_name(complete, name, content, complaint):
    """Somebody's editor, or another program's dataset.json."""
    Path(complete, name).write_text(content)

    with pytest.raises(ValueError, match=rf"{re.escape(complete)}/{name}.*{complaint}"):
        dataset.Dataset.open(complete)


def begin(uri: str, simulation: Simulation, num_images: int, shard_size: int | None = None) -> dataset.Plan:
    plan = dataset.plan_for(
        uri, recipe="tiny", split="train", simulation=simulation, num_images=num_images, shard_size=shard_size
    )
    dataset.begin(uri, plan)
    return plan


def test_asking_for_more_images_withdraws_the_manifest_and_extends_the_plan(complete, simulation):
    """From here on the dataset is incomplete, and must not look complete; what stands is kept."""
    plan = begin(complete, simulation, 13)

    assert dataset.read_manifest(complete) is None
    assert dataset.read_plan(complete) == plan
    assert (plan.num_images, plan.num_shards, list(plan.rows(2)), list(plan.rows(3))) == (13, 4, [8, 9, 10, 11], [12])
    assert len(dataset.standing_shards(complete)) == 3


def test_after_an_extension_only_the_short_last_shard_is_no_longer_sound(complete, simulation):
    """The rest was paid for already."""
    begin(complete, simulation, 13)

    assert [sound(complete, shard, with_manifest=False) for shard in range(4)] == [True, True, False, False]


def test_an_extension_that_fails_at_once_leaves_no_manifest(complete, simulation, full_disk):
    """The manifest goes first: were the plan first, a crash between would leave a dataset that only looks complete."""
    with full_disk(100), pytest.raises(OSError, match="file too large"):
        begin(complete, simulation, 13)

    assert dataset.read_manifest(complete) is None
    assert dataset.read_plan(complete).num_images == 10
    assert not [name for name in os.listdir(complete) if name.endswith(".tmp")]


@pytest.mark.parametrize("num_images", [1, 9, 10])
def test_asking_for_no_more_images_is_met_by_what_stands(complete, simulation, num_images):
    """Two experiments of different size share one dataset; nothing is deleted."""
    plan = begin(complete, simulation, num_images)

    assert plan.num_images == 10
    assert dataset.verify(complete) == []


def test_another_shard_size_is_refused_and_changes_nothing(complete, simulation):
    """The rows of a shard follow from its size, so half the shards would be others."""
    with pytest.raises(
        ValueError, match=r"has shards of 4 images; got --shard-size 5\. Leave it at 4, or choose another --to\."
    ):
        begin(complete, simulation, 20, shard_size=5)

    assert dataset.verify(complete) == []


@pytest.mark.parametrize("begun", [False, True])
def test_of_two_plans_made_at_once_the_first_stays_unless_the_second_extends_it(
    make_dataset, simulation, tmp_path, begun
):
    """The run of the other goes on by it; a shrunk or exchanged plan would disown its shards."""
    uri = dataset.location(str(tmp_path), recipe="tiny", split="train", simulation=simulation)
    if begun:
        make_dataset(tmp_path, simulation)
    asked = {"more": 20, "most": 30}
    plans = {
        name: dataset.plan_for(
            uri, recipe="tiny", split="train", simulation=simulation, num_images=num_images, shard_size=4
        )
        for name, num_images in asked.items()
    }
    other_size = plans["most"].override({"shard_size": 5})

    dataset.begin(uri, plans["more"])
    dataset.begin(uri, plans["most"])

    for late in (plans["more"], other_size):
        with pytest.raises(ValueError, match="has just been begun otherwise by another run; run the same command"):
            dataset.begin(uri, late)
    assert dataset.read_plan(uri) == plans["most"]


def test_runs_that_begin_the_same_dataset_at_once_all_go_on(simulation, tmp_path):
    """None may take the plan that another has just written for another plan."""
    num_runs, num_images = 4, range(4, 44, 4)
    together = threading.Barrier(num_runs, timeout=20)

    def run(uri: str) -> None:
        for number in num_images:
            plan = dataset.plan_for(
                uri, recipe="tiny", split="train", simulation=simulation, num_images=number, shard_size=4
            )
            together.wait()
            dataset.begin(uri, plan)

    uris = [
        dataset.location(str(tmp_path / str(k)), recipe="tiny", split="train", simulation=simulation) for k in "abcde"
    ]
    with ThreadPoolExecutor(num_runs) as runs:
        for uri in uris:
            assert list(runs.map(run, [uri] * num_runs)) == [None] * num_runs
    assert [dataset.read_plan(uri).num_images for uri in uris] == [num_images[-1]] * len(uris)


def test_more_shards_than_their_names_can_order_are_refused(simulation, tmp_path):
    """part-100000 comes before part-10001 to whoever sorts names."""
    uri = dataset.location(str(tmp_path), recipe="tiny", split="train", simulation=simulation)
    with pytest.raises(ValueError, match=r"in shards of 10 are 100,001\. Choose --shard-size 11 or more"):
        dataset.plan_for(uri, recipe="tiny", split="train", simulation=simulation, num_images=1_000_001, shard_size=10)
    names = [dataset.shard_name(number) for number in (0, 9_999, 10_000, dataset.MAX_SHARDS - 1)]
    assert names == sorted(names)


def test_a_parquet_file_that_is_not_ours_is_refused_and_kept(complete, simulation):
    """It is somebody's data."""
    place = shard_path(complete, 1)
    pq.write_table(pq.read_table(place).replace_schema_metadata(None), place, store_schema=False)
    theirs = place.read_bytes()

    with pytest.raises(ValueError, match=r"part-00001\.parquet belongs to another dataset: raylens did not write it"):
        sound(complete, 1, with_manifest=False)
    assert place.read_bytes() == theirs


def test_a_plan_that_was_changed_is_refused(complete, simulation):
    """Its shards would be another simulation's under this one's name."""
    other = simulation.override({"lens.theta_E": 1.1})
    place = Path(complete, "dataset.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | {"simulation": other.as_dict()}))

    with pytest.raises(ValueError, match=r"lens\.theta_E is 1\.1 there and 1\.5 here"):
        begin(complete, simulation, 20)


def test_a_plan_comes_before_any_shard_and_is_no_dataset_yet(simulation, tmp_path):
    """What a run that died at once leaves behind says what it was to become."""
    uri = dataset.location(str(tmp_path), recipe="tiny", split="test", simulation=simulation)
    plan = dataset.plan_for(uri, recipe="tiny", split="test", simulation=simulation, num_images=10, shard_size=4)

    dataset.begin(uri, plan)

    assert os.listdir(uri) == ["dataset.json"]
    with pytest.raises(ValueError, match="has 0 of 3 shards and no manifest"):
        dataset.Dataset.open(uri)


def test_the_manifest_is_written_last(complete):
    """Its presence means complete, so nothing may follow it."""
    changed = {name: os.stat(f"{complete}/{name}").st_mtime_ns for name in os.listdir(complete)}

    assert max(changed, key=changed.__getitem__) == "manifest.json"
    assert min(changed, key=changed.__getitem__) == "dataset.json"


def test_a_dataset_that_stands_is_not_written_again(complete, simulation):
    """Finishing what is finished changes no file: others may be reading them."""
    manifest = dataset.read_manifest(complete)
    changed = {name: os.stat(f"{complete}/{name}").st_mtime_ns for name in os.listdir(complete)}

    dataset.finish(complete, begin(complete, simulation, 10), manifest.shards, set(manifest.processors))

    assert {name: os.stat(f"{complete}/{name}").st_mtime_ns for name in os.listdir(complete)} == changed


def test_a_dataset_from_before_a_later_setting_is_gone_on_with(complete, simulation):
    """Its rows are those that are made now, under the same name, and its shards must stay."""
    place = Path(complete, "dataset.json")
    plan = json.loads(place.read_text())
    del plan["simulation"]["subhalos"]["mass_total"]
    place.write_text(json.dumps(plan))
    names = set(os.listdir(complete))

    assert begin(complete, simulation, 10).simulation == simulation
    assert set(os.listdir(complete)) == names
    assert dataset.verify(complete) == []


def test_location_carries_recipe_split_and_digest(simulation):
    """Two datasets that differ in anything must not share a folder."""
    place = dataset.location("s3://bucket/data/", recipe="smoke", split="test-alpha-1.6", simulation=simulation)
    other = simulation.override({"seed": 1})

    assert place == f"s3://bucket/data/smoke-test-alpha-1.6-{simulation.digest}"
    assert dataset.location("s3://bucket/data", recipe="smoke", split="test-alpha-1.6", simulation=other) != place


def test_an_unknown_split_is_refused_with_those_there_are():
    """test-alpha-1.7 would otherwise be simulated as anything."""
    with pytest.raises(
        ValueError, match=r"test-alpha-1\.7 is no split; the splits are train, validation, test, test-alpha-1\.6"
    ):
        dataset.check_split("test-alpha-1.7")
