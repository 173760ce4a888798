"""Predictions of any images, on Ray: the same as torch alone, one row an image, and a reason for each that has none."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from astropy.io import fits
from test_cli import assert_refused, make_run

from raylens import export, image, learning, models, onnx_model, predict, shards, storage
from raylens.dataset import Dataset


@pytest.fixture(scope="module")
def data(make_dataset, tiny, tmp_path_factory) -> Dataset:
    """Ten images in shards of four, four and two."""
    return Dataset.open(make_dataset(tmp_path_factory.mktemp("data"), tiny))


@pytest.fixture(scope="module")
def pixels(data) -> np.ndarray:
    return np.concatenate([shards.images(shards.read(uri, ["image"])) for uri, _ in data.parts])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, str]:
    """Two networks that nobody trained."""
    root = tmp_path_factory.mktemp("runs")
    return {name: make_run(root / name, name.replace("_", "-"), 8) for name in ("n_cnn", "alpha_cnn")}


def in_torch(runs: dict[str, str], images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """N and alpha, given that N, without Ray."""
    image_BHW = torch.from_numpy(np.array(images, np.float32))
    num_subhalos_B = learning.predict(models.load(runs["n_cnn"], "n-cnn"), image_BHW, torch.zeros(len(images)))
    alpha_B = learning.predict(models.load(runs["alpha_cnn"], "alpha-cnn"), image_BHW, num_subhalos_B)
    return num_subhalos_B.numpy(), alpha_B.numpy()


def assert_predicts(table: pa.Table, runs: dict[str, str], images: np.ndarray) -> None:
    n, alpha = in_torch(runs, images)
    assert table["skipped"].null_count == len(table) == len(images)
    np.testing.assert_allclose(table["n_cnn"].to_numpy(), n, rtol=1e-6)
    np.testing.assert_allclose(table["alpha_cnn"].to_numpy(), alpha, rtol=1e-6)


def assert_says(table: pa.Table, wanted: dict[tuple[str, int], str | None]) -> None:
    """Each image once and in order, and of those that are skipped something of the reason."""
    found = list(zip(table["file"].to_pylist(), table["number"].to_pylist(), strict=True))
    assert found == list(wanted)
    for place, reason, n, alpha in zip(
        found, *(table[name].to_pylist() for name in ("skipped", "n_cnn", "alpha_cnn")), strict=True
    ):
        if wanted[place] is None:
            assert reason is None
            assert np.isfinite([n, alpha]).all()
        else:
            assert wanted[place] in reason
            assert n is alpha is None


def test_a_dataset_is_predicted_with_its_truth_beside(data, pixels, runs, tmp_path, ray_cluster):
    """So that predicted against true is one line of plotting."""
    to = str(tmp_path / "out.parquet")

    made = predict.predict(data.uri, to, **runs)

    table = pq.read_table(to)
    assert_predicts(table, runs, pixels)
    truth = data.read(["index", "num_subhalos", "alpha"])
    for name, values in truth.items():
        np.testing.assert_array_equal(table[name].to_numpy(), values)
    assert_says(table, {(f"part-0000{row // 4}.parquet", row % 4): None for row in range(10)})
    assert (made.num_images, made.num_skipped, made.num_files, made.num_without_pixel_scale) == (10, 0, 3, 0)
    assert made.images_per_second == pytest.approx(10 / made.seconds)
    assert 0 < made.cpu_seconds < 10 * made.seconds


def test_each_column_says_its_unit_and_the_file_what_predicted_it(data, runs, tmp_path, ray_cluster):
    """The file will be copied away from the runs."""
    predict.predict(data.uri, str(tmp_path / "out.parquet"), **runs)

    schema = pq.read_schema(tmp_path / "out.parquet")

    assert schema.names == ["file", "number", "n_cnn", "alpha_cnn", "skipped", "index", "num_subhalos", "alpha"]
    assert all(field.metadata[b"description"] for field in schema)
    assert [field.name for field in schema if b"unit" not in field.metadata] == ["file", "skipped"]
    assert {field.metadata.get(b"unit") for field in schema} == {b"1", None}
    told = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert told.items() >= {"images": data.uri, **runs, "n_cnn.dataset_digest": "00000000"}.items()
    assert told.keys() >= {"raylens", "alpha_cnn.dataset_digest"}


def test_an_exported_file_and_a_lone_shard_are_predicted_as_their_dataset(data, pixels, runs, tmp_path, ray_cluster):
    """Whoever is sent sixteen images gets the numbers of whoever has them all."""
    export.export(data.uri, str(tmp_path / "some.fits"), index="2:9")
    shutil.copy(data.parts[1][0], tmp_path / "lone.parquet")

    predict.predict(str(tmp_path / "some.fits"), str(tmp_path / "of" / "fits.parquet"), **runs)
    predict.predict(str(tmp_path / "lone.parquet"), str(tmp_path / "of" / "shard.parquet"), **runs)

    assert_predicts(pq.read_table(tmp_path / "of" / "fits.parquet"), runs, pixels[2:9])
    assert_predicts(pq.read_table(tmp_path / "of" / "shard.parquet"), runs, pixels[4:8])


@pytest.fixture
def folder(pixels, tmp_path) -> Path:
    """Good images in each format, in other units than those of training, and all manner of bad ones."""
    path = tmp_path / "images"
    path.mkdir()
    counts = (pixels * 1000 + 50).round()
    scale = {"CUNIT1": "arcsec", "CUNIT2": "arcsec", "CDELT1": 0.75, "CDELT2": 0.75}
    other = {**scale, "CDELT1": 0.4, "CDELT2": 0.4}
    nan = counts[3].copy()
    nan[2, 2] = np.nan
    np.save(path / "a.npy", counts[0].astype(">i4"))
    hdus = [
        fits.ImageHDU(counts[1], fits.Header(scale)),
        fits.ImageHDU(counts[2], fits.Header(other)),
        fits.ImageHDU(nan),
    ]
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(path / "b.fits")
    np.save(path / "c.npy", counts[:, :, :7])
    (path / "d.fits").write_text("not an image")
    np.save(path / "e.npy", np.array([[{}]], object))
    whole = (path / "b.fits").read_bytes()
    (path / "f.fits").write_bytes(whole[: 2880 * 3 + 100])  # within the second image's header
    np.save(path / "g.npy", np.stack([counts[4], np.full((8, 8), 3.0), counts[5]]))
    pq.write_table(pa.table({"image": counts[6:8].tolist()}), path / "h.parquet")
    (path / "notes.txt").write_text("to be left aside")
    return path


BAD = {
    ("a.npy", 0): None,
    ("b.fits", 0): None,
    ("b.fits", 1): "trained on pixels of 0.75 arcsec, and these have 0.4",
    ("b.fits", 2): "not finite",
    **{("c.npy", number): "trained on images of 8 x 8 pixels, and these have 7 x 8" for number in range(10)},
    ("d.fits", 0): "cannot be read as FITS",
    ("e.npy", 0): "allow_pickle=False",
    ("f.fits", 0): None,
    ("f.fits", 1): "from here on the file is damaged",
    ("g.npy", 0): None,
    ("g.npy", 1): "all its pixels are equal",
    ("g.npy", 2): None,
    ("h.parquet", 0): None,
    ("h.parquet", 1): None,
}


def test_bad_images_are_skipped_with_the_reason_and_the_others_predicted(main, pixels, runs, folder, ray_cluster):
    """A night's job must not end at the first broken download; and the good ones are normalised as in training."""
    to = str(folder.parent / "out.parquet")
    where = ("--n-cnn", runs["n_cnn"], "--alpha-cnn", runs["alpha_cnn"])

    ran = main("predict", *where, "--images", str(folder), "--to", to)

    assert ran.returncode == 0, ran
    table = pq.read_table(to)
    assert table.column_names == ["file", "number", "n_cnn", "alpha_cnn", "skipped"]
    assert_says(table, BAD)
    good = table.filter(pa.compute.is_null(table["skipped"]))
    counts = (pixels[[0, 1, 1, 4, 5, 6, 7]] * 1000 + 50).round()
    assert_predicts(good, runs, image.normalise(counts))
    facts = ran.facts
    told = ("num_files", "num_ignored", "num_images", "num_skipped", "num_without_pixel_scale")
    assert [facts[name] for name in told] == [8, 1, 23, 16, 5]
    assert len(facts["skipped"]) == 10
    assert facts["skipped"][0]["file"] == "b.fits"
    assert "skipped: number 2 in b.fits: it holds pixels that are not finite numbers" in ran.stdout
    assert "and 6 more; the column `skipped` says which and why" in ran.stdout
    assert "1 other files are left aside" in ran.stdout
    assert "5 images state no pixel scale" in ran.stdout
    assert "predict" in ran.stderr
    assert "8 of 8 files  23 images" in ran.stderr


def test_many_small_files_share_a_task(pixels, runs, tmp_path, monkeypatch, ray_cluster):
    """Each task costs the driver more than an image does a worker; nothing may be lost where files meet."""
    monkeypatch.setattr(predict, "_MAX_TASKS", 2)
    monkeypatch.setattr(predict, "_MAX_TASKS_PER_CPU", 0)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(23):
        np.save(folder / f"{number:02}.npy", pixels[number % 10])
    many = np.tile(pixels, (60, 1, 1))  # more than are predicted at once
    np.save(folder / "23.npy", many)
    heard = []

    predict.predict(str(folder), str(tmp_path / "out.parquet"), **runs, progress=lambda *words: heard.append(words))

    assert_predicts(pq.read_table(tmp_path / "out.parquet"), runs, np.concatenate([pixels[np.arange(23) % 10], many]))
    assert len(heard) == 2
    assert heard[-1] == (24, 24, "623 images")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"camera.num_pixels": 9, "camera.pixel_scale": 2 / 3}, r"trained on images of 8 x 8 pixels, and these have 9"),
        (
            {"camera.num_pixels": 8, "camera.pixel_scale": 0.7},
            r"trained on pixels of 0\.75 arcsec, and these have 0\.7",
        ),
    ],
)
def test_images_of_another_kind_are_refused_as_a_whole(
    main, make_dataset, tiny, runs, tmp_path, change, reason, ray_cluster
):
    """As a dataset before any work, as files when none of them fits; and nothing is written."""
    uri = make_dataset(tmp_path / "data", tiny.override(change), num_images=4)
    export.export(uri, str(tmp_path / "data" / "some.fits"), index=":")
    where = ("predict", "--n-cnn", runs["n_cnn"], "--alpha-cnn", runs["alpha_cnn"], "--to", str(tmp_path / "o.parquet"))

    whole = main(*where, "--images", uri)
    files = main(*where, "--images", str(tmp_path / "data"))

    assert_refused(whole, rf"n_cnn cannot predict .*: the n-cnn was {reason}")
    assert_refused(files, rf"none of the 4 images of .* the first, number 0 in some\.fits: the n-cnn was {reason}")
    assert not (tmp_path / "o.parquet").exists()


def test_networks_that_do_not_belong_together_are_refused(main, data, runs, tmp_path, ray_cluster):
    """A run folder is one slip away from another."""
    coarse = make_run(tmp_path / "coarse", "alpha-cnn", 8, pixel_scale=1.5)

    ran = main(
        "predict",
        "--n-cnn",
        runs["n_cnn"],
        "--alpha-cnn",
        coarse,
        "--images",
        data.uri,
        "--to",
        f"{tmp_path}/o.parquet",
    )

    assert_refused(ran, r"the n-cnn on 8 x 8 pixels of 0\.75 arcsec, normalised, the alpha-cnn on .* 1\.5 arcsec")


def test_networks_of_fluxes_predict_fluxes_and_refuse_the_unknown(make_dataset, tiny, tmp_path, ray_cluster):
    """A dataset, and what raylens has exported of it, are known; another's file is not."""
    uri = make_dataset(tmp_path / "data", tiny.override({"camera.normalise": False}))
    pixels = np.concatenate([shards.images(shards.read(part, ["image"])) for part, _ in Dataset.open(uri).parts])
    runs = {
        name: make_run(tmp_path / name, name.replace("_", "-"), 8, normalised=False) for name in ("n_cnn", "alpha_cnn")
    }
    export.export(uri, str(tmp_path / "some" / "a.fits"), index=":")
    np.save(tmp_path / "some" / "b.npy", pixels[0])

    predict.predict(uri, str(tmp_path / "whole.parquet"), **runs)
    predict.predict(str(tmp_path / "some"), str(tmp_path / "files.parquet"), **runs)

    assert_predicts(pq.read_table(tmp_path / "whole.parquet"), runs, pixels)
    files = pq.read_table(tmp_path / "files.parquet")
    assert_predicts(files.slice(0, 10), runs, pixels)
    assert "not known in which units" in files["skipped"][10].as_py()


def test_fluxes_are_normalised_for_networks_of_normalised_images(make_dataset, tiny, runs, tmp_path, ray_cluster):
    """As in training; an evaluation of the same dataset sees the same images."""
    data = Dataset.open(make_dataset(tmp_path, tiny.override({"camera.normalise": False})))
    pixels = np.concatenate([shards.images(shards.read(part, ["image"])) for part, _ in data.parts])

    predict.predict(data.uri, str(tmp_path / "out.parquet"), **runs)
    (columns,), _ = predict.predict_with_truth([data], **runs)

    assert_predicts(pq.read_table(tmp_path / "out.parquet"), runs, image.normalise(pixels))
    np.testing.assert_allclose(columns["n_cnn"], in_torch(runs, image.normalise(pixels))[0], rtol=1e-6)


def test_a_damaged_shard_of_a_dataset_ends_the_job_and_is_named(main, data, runs, tmp_path, ray_cluster):
    """Rows of a dataset are known; to leave some out would bias whatever is made of the predictions."""
    uri = shutil.copytree(data.uri, tmp_path / Path(data.uri).name)
    content = bytearray((uri / "part-00001.parquet").read_bytes())
    content[300] ^= 1
    (uri / "part-00001.parquet").write_bytes(content)
    where = ("--n-cnn", runs["n_cnn"], "--alpha-cnn", runs["alpha_cnn"], "--to", str(tmp_path / "out.parquet"))

    ran = main("predict", *where, "--images", str(uri))

    assert_refused(ran, r"part-00001\.parquet cannot be read: .*`raylens verify ")
    assert not (tmp_path / "out.parquet").exists()


def test_from_s3_and_to_s3(main, folder, pixels, runs, s3, ray_cluster):
    """Images, networks and predictions; the same file as from a local folder."""
    where = f"{s3}/predict"
    for path in folder.iterdir():
        storage.write(f"{where}/images/{path.name}", path.read_bytes())
    for name, run in runs.items():
        for path in Path(run).iterdir():
            storage.write(f"{where}/{name}/{path.name}", path.read_bytes())

    ran = main(
        "predict", "--n-cnn", f"{where}/n_cnn", "--alpha-cnn", f"{where}/alpha_cnn",
        "--images", f"{where}/images", "--to", f"{where}/out.parquet", "--quiet",
    )  # fmt: skip

    assert ran.returncode == 0, ran
    assert len(ran.stdout.splitlines()) == 1
    assert ran.facts["predictions"] == f"{where}/out.parquet"
    table = pq.read_table(pa.BufferReader(storage.read(f"{where}/out.parquet")))
    assert_says(table, BAD)
    assert table.schema.metadata[b"n_cnn"].decode() == f"{where}/n_cnn"


def test_the_code_of_the_docs_runs_and_its_ways_agree(data, pixels, runs, tmp_path, monkeypatch, ray_cluster):
    """Examples that nobody runs are wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    predict.predict(data.uri, "predictions.parquet", **runs)
    np.save("images.npy", pixels)
    for name, run in runs.items():
        shutil.copytree(run, f"runs/{name.replace('_', '-')}")
        onnx_model.export(run, f"{name.replace('_', '-')}.onnx")
    text = (Path(__file__).parents[1] / "docs" / "predict.md").read_text()

    known: list[dict] = []
    for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        known.append({})
        exec(code, known[-1])

    assert Path("n.png").stat().st_size > 0
    predicted = [(names["num_subhalos"], names["alpha"]) for names in known if "alpha" in names]
    assert len(predicted) == 2
    for n, alpha in predicted:
        np.testing.assert_allclose(n, in_torch(runs, pixels)[0], rtol=1e-5)
        np.testing.assert_allclose(alpha, in_torch(runs, pixels)[1], rtol=1e-5)
