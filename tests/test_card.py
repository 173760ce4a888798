"""What a dataset says of itself: the numbers, commands and pictures of its card are those of its rows."""

import io
import json
import re
import shlex
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from threadpoolctl import threadpool_limits

from raylens import card, generate, recipes
from raylens.config import Simulation
from raylens.shards import Statistics
from raylens.simulate import simulate_block


@pytest.fixture(scope="module")
def simulation(tiny) -> Simulation:
    """With the subhaloes one by one, so that every column is there."""
    return tiny.override({"output.catalogue": True})


@pytest.fixture(scope="module")
def described(make_dataset, simulation, tmp_path_factory) -> Path:
    """Ten images in shards of four, four and two, with their card."""
    return Path(make_dataset(tmp_path_factory.mktemp("described"), simulation, with_card=True))


@pytest.fixture(scope="module")
def made(simulation, tmp_path_factory, ray_cluster) -> Path:
    """A test set of eleven images in shards of three, made the usual way."""
    root = str(tmp_path_factory.mktemp("made"))
    return Path(
        generate.simulate(simulation, root, recipe="tiny", split="test", num_images=11, shard_size=3).dataset
    )  # fmt: skip


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def contents(folder: Path | str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def columns_of(text: str) -> dict[str, dict[str, str]]:
    """Return the table of columns of a card."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if "|" in line]
    head = next(line for line in lines if line[0] == "column")
    return {line[0].strip("`"): dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head)}


def commands_of(text: str) -> list[list[str]]:
    """Return the words of each `raylens ...` that a card tells to type."""
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("raylens ")]


def values_of(folder: Path, name: str) -> np.ndarray:
    """Return all values of a column of a dataset as one flat array."""
    parts = [pq.read_table(path)[name].combine_chunks() for path in sorted(folder.glob("*.parquet"))]
    while hasattr(parts[0], "flatten") and parts[0].type.num_fields:
        parts = [part.flatten() for part in parts]
    return np.concatenate([part.to_numpy() for part in parts])


def assert_numbers_are_those_of_the_rows(folder: Path) -> None:
    table = columns_of(text_of(folder))
    assert list(table)[1:] == pq.read_schema(folder / "part-00000.parquet").names
    for name, cells in list(table.items())[1:]:
        values = values_of(folder, name).astype(np.float64)
        stated = [float(cells[key].replace(",", "")) for key in ("min", "max", "mean", "sd")]
        expected = [values.min(), values.max(), values.mean(), values.std()]
        np.testing.assert_allclose(stated, expected, rtol=5.1e-4, atol=1e-12 * np.abs(values).max(), err_msg=name)


def test_the_table_of_columns_is_that_of_the_rows(described):
    """Whoever picks a dataset by its statistics should get what they say."""
    assert_numbers_are_those_of_the_rows(described)


def test_a_card_is_of_the_whole_dataset_also_after_it_has_grown(simulation, tmp_path, ray_cluster):
    """Shards that stood are counted too, and the short last one, which is made again, once."""
    for num_images in (10, 17):
        uri = generate.simulate(simulation, str(tmp_path), recipe="tiny", num_images=num_images, shard_size=4).dataset
        assert_numbers_are_those_of_the_rows(Path(uri))
        assert f"\n{num_images} simulated images of" in text_of(Path(uri))


def test_each_column_stands_in_the_card_with_unit_and_meaning(described):
    """The same as in the files, so that they cannot drift apart."""
    table = columns_of(text_of(described))

    for field in pq.read_schema(described / "part-00000.parquet"):
        assert table[field.name]["unit"].encode() == field.metadata[b"unit"]
        assert table[field.name]["meaning"].encode() == field.metadata[b"description"]
    assert table["image"]["type"] == "float32 [8, 8]"
    assert table["num_subhalos"]["type"] == "int32"
    assert table["subhalos_mass"]["type"] == "list of float64"


VALUES = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(-1e6, 1e6))


@given(parts=st.lists(VALUES, min_size=1, max_size=6), offset=st.sampled_from([0.0, 1e9]))
def test_statistics_of_parts_add_up_to_those_of_the_whole(parts, offset):
    """A dataset is never in one memory; with a naive sum of squares a large mean would swallow the deviations."""
    parts = [part + offset for part in parts]
    whole = np.concatenate(parts)

    summed = reduce(add, map(Statistics.of, parts))

    assert (summed.num, summed.low, summed.high) == (whole.size, whole.min(), whole.max())
    assert summed.mean == pytest.approx(whole.mean(), rel=1e-12, abs=1e-8)
    assert summed.sd == pytest.approx(whole.std(), rel=1e-6, abs=1e-6)


@given(value=st.floats(-1e12, 1e12), nums=st.lists(st.integers(1, 2000), min_size=1, max_size=4))
def test_what_does_not_vary_has_no_spread(value, nums):
    """Rounding would give a fixed Einstein radius a standard deviation of 2e-16, and a reader something to wonder."""
    summed = reduce(add, (Statistics.of(np.full(num, value)) for num in nums))

    assert (summed.low, summed.mean, summed.high, summed.sd) == (value, value, value, 0)


def test_statistics_of_single_precision_are_those_of_double():
    """A million pixels summed in single precision lose digits that the card prints."""
    pixels = np.random.default_rng(0).random((300, 60, 60), dtype=np.float32)
    exact = pixels.astype(np.float64)

    of_pixels = Statistics.of(pixels)

    assert of_pixels.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert of_pixels.sd == pytest.approx(exact.std(), rel=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_statistics_do_not_depend_on_the_number_of_threads(kind):
    """They are in each shard, whose bytes must be the same on a node of two cores and on one of sixty-four."""
    values = np.random.default_rng(0).random(300_000).astype(kind)
    found = []

    for num_threads in (1, 2, 3):
        with threadpool_limits(num_threads):
            found.append(Statistics.of(values))

    assert found[0] == found[1] == found[2]


def test_the_commands_of_the_card_make_the_same_files_again(made, main, tmp_path, monkeypatch, ray_cluster):
    """The promise of a dataset: whoever has it, or only its card, can make it; split and shards follow it."""
    export, verify, show, again, from_the_card = commands_of(text_of(made))
    card_alone = tmp_path / "card alone"
    card_alone.mkdir()
    simulation = re.search(r"```json\n(.*?)```", text_of(made), re.S)[1]
    (card_alone / "recipe.json").write_text(simulation)
    place = {"ELSEWHERE": str(tmp_path / "elsewhere")}

    monkeypatch.chdir(made)
    exported = main(*export[:-1], str(tmp_path / export[-1]))
    verified, shown = main(*verify), main(*show)
    made_again = main(*(place.get(word, word) for word in again))
    monkeypatch.chdir(card_alone)
    made_from_the_card = main(*({"ELSEWHERE": "."}.get(word, word) for word in from_the_card))

    assert exported.facts["num_images"] == 11
    assert verified.facts["sound"] is True
    assert shown.facts["simulation"] == json.loads(simulation)["simulation"]
    assert (shown.facts["name"], shown.facts["num_images"]["test"]) == ("tiny", 11)
    assert made_again.facts["dataset"] == str(tmp_path / "elsewhere" / made.name)
    assert contents(made_again.facts["dataset"]) == contents(made_from_the_card.facts["dataset"]) == contents(made)
    assert len(list(made.glob("*.parquet"))) == 4


def test_the_plan_alone_makes_the_same_files_again(made, main, tmp_path, ray_cluster):
    """A few lines of JSON in a mail are a terabyte of images."""
    plan = tmp_path / "mail" / "dataset.json"
    plan.parent.mkdir()
    plan.write_bytes((made / "dataset.json").read_bytes())

    again = main("simulate", str(plan.parent), "--to", str(tmp_path / "elsewhere"))

    assert contents(again.facts["dataset"]) == contents(made)


@pytest.mark.parametrize("name", ["README.md", "contact-sheet.png", "illustration.json"])
def test_a_lost_part_of_the_card_is_made_again(made, simulation, tmp_path, ray_cluster, name):
    """Running the same command again mends whatever is missing."""
    before = contents(made)
    (made / name).unlink()

    generate.simulate(simulation, str(made.parent), recipe="tiny", split="test", num_images=11)

    assert contents(made) == before


def test_the_card_says_what_an_image_shows(tiny, make_dataset, tmp_path):
    """Noise, blur and scaling decide what can be learnt from an image; nobody should have to read the code."""
    paper = text_of(Path(make_dataset(tmp_path, tiny, num_images=1, with_card=True)))
    bare = tiny.override({
        "camera.signal_to_noise": None, "camera.psf_sigma": 0, "camera.normalise": False,
        "subhalos.compensation": "sheet",
    })  # fmt: skip
    other = text_of(Path(make_dataset(tmp_path, bare, num_images=1, split="test-alpha-1.8", with_card=True)))

    coded = tiny.override({
        "cosmology": "WMAP9", "source.cut": 1.42, "camera.bits": 8, "subhalos.mass_function": "decades",
        "subhalos.mass_min": 1e9, "subhalos.mass_max": 1e11, "subhalos.mass_total": 1.44e12, "subhalos.h": 0.8,
        "subhalos.z_lens": 1.0,
    })  # fmt: skip
    told = text_of(Path(make_dataset(tmp_path, coded, num_images=1, with_card=True)))

    assert "cut at 1.42 arcsec" in told
    assert "masses are 1e+09 Msun and its tenfolds up to 1e+11 Msun" in told
    assert "until they reach 1.44e+12 Msun. Distances are those of WMAP9." in told
    assert "Einstein radii are those of 0.8 of their masses in a lens of redshift 1." in told
    assert "from 0 to 1, in 256 steps." in told
    assert "Gaussian of sigma 0.07 arcsec." in paper
    assert "signal-to-noise ratio of 300 summed over the frame." in paper
    assert "scaled to run from 0 to 1" in paper
    assert "alpha is held" not in paper
    assert "1 simulated image of" in paper
    assert "point-spread" not in other
    assert "There is no noise." in other
    assert "in units of the source's central brightness." in other
    assert "alpha is held at -1.8." in other
    assert "negative convergence" in other


def test_the_head_of_the_card_is_what_hubs_read(described):
    """A hub ignores a head that it cannot parse, and then shows no table. The licence is for the maker to choose."""
    head, _, body = text_of(described).removeprefix("---\n").partition("\n---\n")
    values = yaml.safe_load(head)

    assert values["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "part-*.parquet"}]}
    ]
    assert values["size_categories"] == ["n<1K"]
    assert {"astronomy", "gravitational-lensing"} <= set(values["tags"])
    assert values["pretty_name"].startswith(described.name.replace("-", " "))
    assert "license" not in values
    assert "**Licence:** none is stated" in body


def test_a_card_is_a_function_of_the_dataset(described, make_dataset, simulation, tmp_path):
    """No date and no place: a card that differs tells that the data do."""
    again = Path(make_dataset(tmp_path, simulation, with_card=True))

    for name in ("README.md", "contact-sheet.png"):
        assert (again / name).read_bytes() == (described / name).read_bytes()


def test_the_contact_sheet_shows_the_first_images(described, simulation):
    """The card embeds it, and a wrong row under a label would be believed."""
    rows = simulate_block(simulation, range(4))  # as many as the first shard has

    expected = card.contact_sheet(rows["image"], rows["num_subhalos"], rows["alpha"])

    assert (described / "contact-sheet.png").read_bytes() == expected
    assert "](contact-sheet.png)" in text_of(described)


def test_a_contact_sheet_has_x_to_the_right_and_y_upwards():
    """As a sky is drawn; image[row, column] printed as a matrix would hang upside down."""
    image = np.zeros((1, 8, 8))
    image[0, 0, 7] = 1  # the lowest y, the highest x

    sheet = np.asarray(Image.open(io.BytesIO(card.contact_sheet(image, [3], [-2.0]))).convert("L")).astype(int)

    panel = sheet[6:126, 6:126]  # below a gap of 6 pixels, 120 to a side
    squares = panel.reshape(8, 15, 8, 15).mean(axis=(1, 3))
    assert np.unravel_index(squares.argmax(), squares.shape) == (7, 7)
    assert squares.max() > 200
    assert np.median(squares) < 10


@pytest.mark.parametrize(("num_images", "num_lines"), [(1, 1), (8, 1), (9, 2), (32, 4)])
def test_a_contact_sheet_is_as_long_as_its_images(num_images, num_lines):
    """A dataset of three images is a dataset too."""
    sheet = Image.open(
        io.BytesIO(card.contact_sheet(np.zeros((num_images, 8, 8)), np.ones(num_images), np.ones(num_images)))
    )

    assert sheet.size == (1014, 140 * num_lines + 30)
    assert sheet.info.keys() <= {"dpi", "transparency"}  # neither date nor software


def test_a_contact_sheet_is_labelled():
    """N and alpha are what there is to see in an image."""
    images = np.zeros((1, 8, 8))
    sheets = {card.contact_sheet(images, [n], [alpha]) for n, alpha in ((3, -2.0), (4, -2.0), (3, -2.1))}

    assert len(sheets) == 3


@pytest.mark.parametrize("num_pixels", [60, 80, 81, 300])
def test_a_contact_sheet_weighs_less_than_300_kilobytes(num_pixels):
    """It is shown on every page that shows the card; noise is what weighs."""
    camera = {"camera.num_pixels": num_pixels, "camera.pixel_scale": 6 / num_pixels}
    rows = simulate_block(recipes.paper_varied().override(camera).simulation, range(card.NUM_SHOWN))

    sheet = card.contact_sheet(rows["image"], rows["num_subhalos"], rows["alpha"])

    assert len(sheet) < 300_000
