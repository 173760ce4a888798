"""A dataset as others read it, by the code that its card gives them, and what a row alone tells of its image."""

import re
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from lenstronomy.Data.imaging_data import ImageData
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from lenstronomy.Util.param_util import phi_q2_ellipticity
from lenstronomy.Util.util import sigma2fwhm

from raylens import dataset, recipes, shards, storage
from raylens.config import Camera, Simulation
from raylens.simulate import noise_sigma, simulate_block

READERS = ("pyarrow", "pandas", "polars", "DuckDB", "Hugging Face datasets", "torch")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "catalogue"])
def simulation(request, tiny) -> Simulation:
    """Without and with lists of subhaloes in the rows."""
    return tiny.override({"output.catalogue": request.param})


@pytest.fixture(scope="module")
def folder(make_dataset, simulation, tmp_path_factory) -> Path:
    """Ten images in shards of four, four and two, with their card."""
    return Path(make_dataset(tmp_path_factory.mktemp("data"), simulation, with_card=True))


@pytest.fixture
def of_the_card(folder, monkeypatch, tmp_path):
    """Run the code that the card gives below a line, in the dataset's folder, and return what it names."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def run(line: str, **replaced: str) -> dict[str, Any]:
        code = re.search(rf"^{line}[^\n]*:\n\n```python\n(.*?)^```$", Path("README.md").read_text(), re.M | re.S)[1]
        names: dict[str, Any] = {}
        for old, new in replaced.items():
            code = code.replace(old, new)
        exec(code, names)
        return names

    return run


def assert_are_the_rows(read: dict[str, Any], simulation: Simulation) -> None:
    expected = simulate_block(simulation, range(10))
    assert tuple(read["images"].shape) == (10, 8, 8)
    assert str(read["images"].dtype).removeprefix("torch.") == "float32"
    np.testing.assert_array_equal(np.asarray(read["images"]), expected["image"])
    for name in ("num_subhalos", "alpha"):
        np.testing.assert_array_equal(np.asarray(read[name]), expected[name])


@pytest.mark.parametrize("reader", READERS)
def test_others_read_images_and_labels_by_the_lines_of_the_card(of_the_card, simulation, reader):
    """Nobody should need raylens to look at our data, nor have to guess how what they use sees a nested list."""
    assert_are_the_rows(of_the_card(reader), simulation)


def test_torch_is_given_tensors(of_the_card):
    """An array in their place would fail at the first step of a training."""
    read = of_the_card("torch")

    assert {type(read[name]) for name in ("images", "num_subhalos", "alpha")} == {torch.Tensor}


def test_a_dataset_on_s3_is_read_in_place_by_the_lines_of_the_card(of_the_card, folder, simulation, s3):
    """What fills a bucket does not fit on the disk of whoever looks at it."""
    storage.upload(str(folder), f"{s3}/readers/{folder.name}")

    read = of_the_card("From S3", BUCKET=f"{s3.removeprefix('s3://')}/readers")

    assert_are_the_rows(read, simulation)


def test_the_unit_of_a_column_is_read_by_the_lines_of_the_card(of_the_card):
    """A number without unit is a guess."""
    assert of_the_card("The unit of a column")["unit"] == "arcsec"


def test_the_subhaloes_are_read_by_the_lines_of_the_card(of_the_card, folder, simulation):
    """One line for each, so that a question about subhaloes is a question about a table."""
    if not simulation.output.catalogue:
        assert "subhalos_x" not in (folder / "README.md").read_text()
        return
    subhalos = of_the_card("The columns `subhalos_")["subhalos"]

    expected = simulate_block(simulation, range(10))
    np.testing.assert_array_equal(subhalos["index"], np.repeat(np.arange(10), expected["num_subhalos"]))
    for name in shards.CATALOGUE:
        np.testing.assert_array_equal(subhalos[name], expected[name])


@pytest.mark.parametrize(("split", "on_a_hub"), [("validation", "validation"), ("test-alpha-1.6", "test")])
def test_the_head_of_the_card_tells_hubs_which_files_and_which_split(
    tiny, make_dataset, tmp_path, monkeypatch, split, on_a_hub
):
    """On a hub a dataset is opened by its name alone, and splits may have no hyphen."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    uri = make_dataset(tmp_path, tiny, split=split, with_card=True)

    opened = datasets.load_dataset(uri)

    assert set(opened) == {on_a_hub}
    np.testing.assert_array_equal(
        opened[on_a_hub].with_format("numpy")["image"][:], simulate_block(tiny, range(10), split)["image"]
    )


def test_the_shape_of_the_images_is_in_their_type(folder):
    """So that polars and datasets show it, and refuse an image of another."""
    assert pl.read_parquet_schema(folder / "part-00000.parquet")["image"] == pl.Array(pl.Float32, (8, 8))
    images = datasets.Features.from_arrow_schema(pq.read_schema(folder / "part-00000.parquet"))["image"]
    assert (images.length, images.feature.length) == (8, 8)


def test_duckdb_answers_questions_about_a_whole_dataset(folder):
    """The shards are one table to whoever reads part-*.parquet."""
    counted = duckdb.sql(f"SELECT count(*), min(index), max(index) FROM '{folder}/*.parquet'")

    assert counted.fetchall() == [(10, 0, 9)]


def image_of(row: dict[str, Any], *, camera: Camera, source_sigma: float) -> np.ndarray:
    """Return the noise-free image of a row of a dataset, by lenstronomy and nothing of ours."""
    # The frame has a border as wide as the point-spread function reaches, from which light blurs in.
    border = int(np.ceil(5 * camera.psf_sigma / camera.pixel_scale))
    n = camera.num_pixels + 2 * border
    corner = -(n - 1) / 2 * camera.pixel_scale
    e1, e2 = phi_q2_ellipticity(row["phi"], row["q"])
    lenses = [{"theta_E": row["theta_E"], "e1": e1, "e2": e2, "center_x": row["x"], "center_y": row["y"]}]
    halos = zip(row["subhalos_theta_E"], row["subhalos_x"], row["subhalos_y"], strict=True)
    lenses += [{"theta_E": theta_E, "center_x": x, "center_y": y} for theta_E, x, y in halos]
    model = ImageModel(
        ImageData(np.zeros((n, n)), ra_at_xy_0=corner, dec_at_xy_0=corner,
                  transform_pix2angle=np.eye(2) * camera.pixel_scale),
        PSF("GAUSSIAN", fwhm=sigma2fwhm(camera.psf_sigma), truncation=5, pixel_size=camera.pixel_scale),
        lens_model_class=LensModel(["SIE"] + ["SIS"] * row["num_subhalos"]),
        source_model_class=LightModel(["GAUSSIAN"]),
    )  # fmt: skip
    # The unit of an image is the brightness at the source's centre.
    amplitude = 2 * np.pi * source_sigma**2 / camera.pixel_scale**2
    image = model.image(lenses, [{"amp": amplitude, "sigma": source_sigma, "center_x": 0, "center_y": 0}])
    return image[border:-border, border:-border]


def rows_of(uri: str) -> list[dict[str, Any]]:
    return [row for shard, _ in dataset.Dataset.open(uri).parts for row in pq.read_table(shard).to_pylist()]


@pytest.mark.parametrize("source_sigma", [0.9, {"uniform": [0.5, 1.0]}], ids=["one source", "varied sources"])
@pytest.mark.parametrize("recipe", ["paper-fixed", "paper-fixed-coarse", "paper-varied"])
def test_lenstronomy_renders_an_image_again_from_its_row(make_dataset, tmp_path, recipe, source_sigma):
    """The catalogue is worth storing if it is the truth: all of it, in these units, and in the row of its image."""
    bare = {"camera.signal_to_noise": None, "camera.normalise": False, "output.catalogue": True}
    simulation = recipes.load(recipe).override(bare | {"source.sigma": source_sigma}).simulation
    rows = rows_of(make_dataset(tmp_path, simulation, num_images=3, shard_size=2))

    for row in rows:
        again = image_of(row, camera=simulation.camera, source_sigma=row.get("source_sigma", 0.9))

        np.testing.assert_allclose(np.array(row["image"]), again, rtol=0, atol=1e-5 * again.max())


@pytest.mark.parametrize("reference", ["frame", "peak"])
def test_an_image_differs_from_that_of_its_row_by_the_stated_noise(make_dataset, tmp_path, reference):
    """What remains of an image once all is taken away that its row explains is noise, and nothing else."""
    exposure = {"camera.normalise": False, "camera.noise_reference": reference, "output.catalogue": True}
    simulation = recipes.paper_varied().override(exposure).simulation
    rows = rows_of(make_dataset(tmp_path, simulation, num_images=6, shard_size=4))
    light = np.array([image_of(row, camera=simulation.camera, source_sigma=0.9) for row in rows])

    noise = np.array([row["image"] for row in rows]) - light

    in_sigmas = noise / noise_sigma(light, simulation)[:, None, None]
    num = in_sigmas.size
    assert abs(in_sigmas.mean()) < 4 / np.sqrt(num)  # four standard deviations of a mean
    assert in_sigmas.std() == pytest.approx(1, abs=4 / np.sqrt(2 * num))
    assert abs(np.corrcoef(in_sigmas.ravel(), light.ravel())[0, 1]) < 4 / np.sqrt(num)
