"""Files of images as others write them: each image as the network takes it, or why not; nothing is unpickled."""

import gzip
import io
import pickle
import re
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_models import card

from raylens import export, image, intake, shards
from raylens.intake import Stack

RAMP = np.arange(64, dtype=np.float32).reshape(8, 8)


def of_fits(*hdus) -> bytes:
    file = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), *hdus]).writeto(file)
    return file.getvalue()


def of_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def of_parquet(images: pa.Array, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": images}), file, **options)
    return file.getvalue()


def with_header(**keywords) -> bytes:
    return of_fits(fits.ImageHDU(RAMP, fits.Header(keywords)))


def read(name: str, content: bytes) -> list[Stack | str]:
    return list(intake.read(name, content))


def the_stack(name: str, content: bytes) -> Stack:
    (found,) = read(name, content)
    assert isinstance(found, Stack), found
    return found


def the_reason(name: str, content: bytes) -> str:
    (found,) = read(name, content)
    assert isinstance(found, str)
    return found


# Images of others


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in ("npy", "parquet") for dtype in ("<f2", "<f4", ">f4", ">f8", "u1", "<u2", "<i8")),
        *((kind, dtype) for kind in ("fits", "fits.gz") for dtype in ("<f4", ">f4", ">f8", "u1", ">i2", ">i4", "<i8")),
    ],
)
def test_numbers_of_any_kind_and_byte_order_are_the_same_image(kind, dtype):
    """FITS is big-endian, cameras count in integers; misread bytes look like noise."""
    pixels = RAMP.astype(dtype)
    if kind == "npy":
        content = of_npy(pixels)
    elif kind == "parquet":
        content = of_parquet(pa.array([pixels.astype(pixels.dtype.newbyteorder("=")).tolist()]))
    else:
        content = of_fits(fits.ImageHDU(pixels))
    if kind == "fits.gz":
        content = gzip.compress(content)

    (prepared,) = intake.prepare(the_stack(f"some.{kind}", content), card())

    assert prepared.image.dtype == np.float32
    np.testing.assert_array_equal(prepared.image, image.normalise(RAMP))


def test_every_extension_with_an_array_is_an_image_and_a_cube_is_a_stack():
    """Tables and empty headers are none."""
    table = fits.BinTableHDU.from_columns([fits.Column("A", "D", array=[1.0])])
    cube = np.stack([RAMP, RAMP.T, RAMP[::-1]])

    found = read("many.fits", of_fits(fits.ImageHDU(RAMP), table, fits.ImageHDU(cube), fits.CompImageHDU(RAMP)))

    assert [stack.pixels.shape for stack in found] == [(1, 8, 8), (3, 8, 8), (1, 8, 8)]
    np.testing.assert_array_equal(found[1].pixels, cube)


def test_fits_integers_are_scaled_as_the_header_says():
    """BZERO and BSCALE hide unsigned integers and packed floats; BLANK is no number."""
    packed = fits.ImageHDU(2 * RAMP + 32768)
    packed.scale("int16", bzero=32768, bscale=2)
    np.testing.assert_array_equal(the_stack("some.fits", of_fits(packed)).pixels[0], 2 * RAMP + 32768)

    blank = fits.ImageHDU(RAMP.astype(np.int16), fits.Header({"BLANK": 63}))
    (prepared,) = intake.prepare(the_stack("some.fits", of_fits(blank)), card())
    assert prepared.image == "it holds pixels that are not finite numbers"


@pytest.mark.parametrize("how", ["lists", "large lists", "fixed-size lists", "polars", "polars arrays", "DuckDB"])
def test_parquet_of_others_holds_the_same_images(how, tmp_path):
    """Each library has its own idea of a nested list."""
    images = np.stack([RAMP, RAMP.T])
    path = tmp_path / "some.parquet"
    if how == "polars":
        pl.DataFrame({"image": images.tolist()}).write_parquet(path)
    elif how == "polars arrays":
        pl.DataFrame({"image": images}).write_parquet(path)
    elif how == "DuckDB":
        two = pa.table({"image": images.tolist()})  # noqa: F841  # DuckDB finds it by its name
        duckdb.sql(f"COPY two TO '{path}' (FORMAT parquet)")
    else:
        lists = {"lists": pa.list_, "large lists": pa.large_list, "fixed-size lists": lambda kind: pa.list_(kind, 8)}[
            how
        ]
        path.write_bytes(of_parquet(pa.array(images.tolist(), lists(lists(pa.float32())))))

    found = read("some.parquet", path.read_bytes())

    np.testing.assert_array_equal(np.concatenate([stack.pixels for stack in found]), images)


# Scale


ARCSEC = {"CUNIT1": "arcsec", "CUNIT2": "arcsec"}
SKY = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"}
C, S = 0.2 / 3600 * np.cos(0.3), 0.2 / 3600 * np.sin(0.3)


@pytest.mark.parametrize(
    "keywords",
    [
        {**ARCSEC, "CDELT1": 0.2, "CDELT2": 0.2},
        {**SKY, **ARCSEC, "CDELT1": -0.2, "CDELT2": 0.2},
        {**SKY, "CDELT1": -0.2 / 3600, "CDELT2": 0.2 / 3600},
        {**SKY, "CDELT1": -0.2 / 3600, "CDELT2": 0.2 / 3600, "PC1_1": 0.6, "PC1_2": -0.8, "PC2_1": 0.8, "PC2_2": 0.6},
        {**SKY, "CD1_1": -C, "CD1_2": S, "CD2_1": S, "CD2_2": C},
        {"CUNIT1": "mas", "CUNIT2": "mas", "CDELT1": 200.0, "CDELT2": 200.0},
    ],
    ids=["linear", "sky in arcsec", "sky in degrees", "turned by PC", "turned by CD", "mas"],
)
def test_scale_is_what_the_header_states_in_its_units(keywords):
    """Degrees taken for arcsec, or a rotation for a scale, would refuse every telescope's images."""
    assert the_stack("some.fits", with_header(**keywords)).pixel_scale == pytest.approx(0.2, rel=1e-9)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"CRPIX1": 4.5}, {"CDELT1": 0.2, "CDELT2": 0.2}, {"CUNIT1": "m", "CUNIT2": "m", "CDELT1": 1.0, "CDELT2": 1.0}],
    ids=["nothing", "no increment", "no unit", "metres"],
)
def test_a_header_without_an_angle_states_no_scale(keywords):
    """The standard's default of one is not a statement."""
    assert the_stack("some.fits", with_header(**keywords)).pixel_scale is None


def test_pixels_that_are_not_square_are_a_reason():
    """Of two scales neither is the network's."""
    keywords = {**ARCSEC, "CDELT1": 0.75, "CDELT2": 0.8}

    assert the_reason("some.fits", with_header(**keywords)) == "its pixels are not square: 0.75 x 0.8 arcsec"


@pytest.mark.parametrize("normalise", [True, False])
def test_what_raylens_wrote_says_its_scale_and_whether_it_is_normalised(make_dataset, tiny, tmp_path, normalise):
    """Also away from its dataset: an exported file, and a shard."""
    uri = make_dataset(tmp_path, tiny.override({"camera.normalise": normalise}), num_images=3)
    export.export(uri, str(tmp_path / "some.fits"), index=":")
    pixels = shards.images(shards.read(f"{uri}/part-00000.parquet", ["image"]))

    for path in (tmp_path / "some.fits", Path(uri, "part-00000.parquet")):
        found = read(path.name, path.read_bytes())

        assert {(stack.pixel_scale, stack.normalised) for stack in found} == {(0.75, normalise)}
        np.testing.assert_array_equal(np.concatenate([stack.pixels for stack in found]), pixels)


# Reasons


class Bomb:
    """An object that, unpickled, leaves a trace."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path):
    """Whoever sends an image could otherwise run what they like."""
    trace = tmp_path / "trace"
    bombs = np.empty((1, 1), object)
    bombs[0, 0] = Bomb(trace)
    archive = io.BytesIO()
    np.savez(archive, bombs)

    reasons = [
        the_reason("bad.npy", content) for content in (of_npy(bombs), pickle.dumps(Bomb(trace)), archive.getvalue())
    ]

    assert not trace.exists()
    assert all(reason.startswith("it cannot be read as a NumPy array: ") for reason in reasons)
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.fits", b"not an image\n", r"^it cannot be read as FITS: No SIMPLE card found"),
        ("a.fits", b"", r"^it cannot be read as FITS: "),
        ("a.fits.gz", of_fits(fits.ImageHDU(RAMP)), r"^it cannot be read as FITS: Not a gzipped file"),
        ("a.fits", of_fits(), r"^it holds no image$"),
        ("a.fits", of_fits(fits.ImageHDU(np.zeros(5))), r"an array of shape \(5,\), and not \(n, n\)"),
        ("a.fits", of_fits(fits.ImageHDU(np.zeros((1, 1, 8, 8)))), r"an array of shape \(1, 1, 8, 8\)"),
        ("a.npy", b"", r"^it cannot be read as a NumPy array: EOF"),
        ("a.npy", of_npy(RAMP)[:-1], r"^it cannot be read as a NumPy array: EOF.*expected 256 bytes got 255"),
        ("a.npy", of_npy(RAMP * 1j), r"values of type complex64, not real numbers"),
        ("a.npy", of_npy(RAMP > 3), r"values of type bool"),
        ("a.npy", of_npy(RAMP[0]), r"an array of shape \(8,\)"),
        ("a.npy", of_npy(RAMP[:, :0]), r"an array of shape \(8, 0\)"),
        ("a.npy", of_npy(np.zeros((0, 8, 8))), r"an array of shape \(0, 8, 8\)"),
        ("a.parquet", b"PAR1", r"^it cannot be read as Parquet: "),
        ("a.parquet", of_parquet(pa.array([], pa.list_(pa.list_(pa.float32())))), r"^it holds no image$"),
        ("a.parquet", of_parquet(pa.array([[1.0, 2.0]])), r"its column image holds list<.*>, not lists of lists"),
        ("a.parquet", of_parquet(pa.array([[["a"]]])), r"its column image holds .*string.*, not lists of lists"),
        ("a.parquet", of_parquet(pa.array([[[1.0, 2.0], [3.0]]])), r"^its rows differ in length$"),
        ("a.parquet", of_parquet(pa.array([None], pa.list_(pa.list_(pa.float32())))), r"^it has no pixels$"),
        ("a.parquet", of_parquet(pa.array([[[1.0], None]])), r"^it has no pixels$"),
        ("a.parquet", of_parquet(pa.array([[[], []]], pa.list_(pa.list_(pa.float32())))), r"^it has no pixels$"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_image_is_one_reason(name, content, reason):
    """In a folder of thousands one is always broken."""
    found = the_reason(name, content)

    assert len(found.splitlines()) == 1
    assert re.search(reason, found)


@pytest.mark.parametrize("kept", [2880 * 4 + 100, 2880 * 3 + 100, 2880 * 4 - 2700])
def test_a_file_that_is_cut_gives_the_images_before_the_cut_and_a_reason(kept):
    """Downloads break off; within a header as well as among pixels."""
    whole = of_fits(*[fits.ImageHDU(RAMP * factor) for factor in (1, 2, 3)])

    found = read("cut.fits", whole[:kept])

    np.testing.assert_array_equal(found[0].pixels, [RAMP])
    assert len(found) == 2
    assert isinstance(found[1], str)


def test_a_damaged_shard_ends_with_a_reason(make_dataset, tiny, tmp_path):
    """Pages of raylens's own files have checksums, and noise would look like an image."""
    uri = make_dataset(tmp_path, tiny, num_images=3)
    content = bytearray(Path(uri, "part-00000.parquet").read_bytes())
    content[300] ^= 1

    assert "cannot be read as Parquet" in the_reason("some.parquet", bytes(content))


@given(st.binary(max_size=300), st.sampled_from(["a.fits", "a.fits.gz", "a.npy", "a.parquet"]), st.booleans())
def test_any_bytes_give_a_reason_and_no_error(content, name, begun_well):
    """What strangers put into a folder must not end the job."""
    heads = {"a.fits": of_fits()[:80], "a.fits.gz": b"\x1f\x8b", "a.npy": b"\x93NUMPY\x01\x00", "a.parquet": b"PAR1"}

    found = read(name, (heads[name] if begun_well else b"") + content)

    assert found
    assert all(isinstance(one, str) and one for one in found)


# Images as the network takes them


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_pixel_that_is_no_number_makes_a_bad_image_and_no_other(bad):
    """Normalised, it would make the whole image nan, and so the prediction."""
    pixels = np.stack([RAMP, RAMP, np.full_like(RAMP, 7), RAMP])
    pixels[1, 3, 4] = bad

    prepared = [one.image for one in intake.prepare(Stack(pixels), card())]

    np.testing.assert_array_equal(prepared[0], image.normalise(RAMP))
    assert prepared[1:3] == ["it holds pixels that are not finite numbers", "all its pixels are equal"]
    np.testing.assert_array_equal(prepared[3], prepared[0])


def test_a_range_that_cannot_be_told_in_its_precision_is_no_number():
    """Divided by infinity all pixels would be equal."""
    pixels = np.zeros((1, 8, 8))
    pixels[0, 0, :2] = -1.7e308, 1.7e308

    (prepared,) = intake.prepare(Stack(pixels), card())

    assert prepared.image == "it holds pixels that are not finite numbers"


@given(hnp.arrays(np.float64, (8, 8), elements=st.integers(-1000, 1000)), st.floats(1e-3, 1e6), st.floats(-1e6, 1e6))
def test_the_units_of_an_image_do_not_matter_to_a_network_of_normalised_ones(pixels, gain, background):
    """Counts, electrons or magnitudes of nothing: that is why the paper's images are normalised."""
    (one,), (other,) = (list(intake.prepare(Stack(one[None]), card())) for one in (pixels, pixels * gain + background))

    if np.ptp(pixels) == 0:
        assert one.image == "all its pixels are equal"
    else:
        assert (one.image.min(), one.image.max()) == (0, 1)
        np.testing.assert_allclose(one.image, other.image, atol=1e-4)


def test_images_that_are_normalised_stay_as_they_are_to_the_last_bit(make_dataset, tiny, tmp_path):
    """So that a dataset gives the predictions of its evaluation."""
    uri = make_dataset(tmp_path, tiny, num_images=4)
    pixels = shards.images(shards.read(f"{uri}/part-00000.parquet", ["image"]))

    prepared = [one.image for one in intake.prepare(Stack(pixels, 0.75, True), card())]

    np.testing.assert_array_equal(prepared, pixels)


def test_fluxes_reach_a_network_of_fluxes_as_they_are():
    """Only where they are known to be such."""
    (prepared,) = intake.prepare(Stack(RAMP[None], 0.75, normalised=False), card(normalised=False))
    np.testing.assert_array_equal(prepared.image, RAMP)

    (unknown,) = intake.prepare(Stack(RAMP[None], 0.75), card(normalised=False))
    assert "not normalised, and of these it is not known in which units they are" in unknown.image


def test_images_that_do_not_fit_are_as_many_reasons():
    """Each has a row of its own in the output."""
    prepared = list(intake.prepare(Stack(np.zeros((3, 8, 9)), 0.75), card()))

    assert len(prepared) == 3
    assert {one.image for one in prepared} == {
        "the n-cnn was trained on images of 8 x 8 pixels, and these have 9 x 8; cut them to that size, or train on "
        "such images."
    }


# Places


def test_a_folder_is_its_files_of_known_kinds_by_name(tmp_path):
    """Hidden files are those of systems and of writers that have not finished."""
    for name in ("b.npy", "a.FITS", "c.fits.gz", "d.parquet", "notes.txt", ".e.npy", "f.npz"):
        (tmp_path / name).write_bytes(b"")

    found = intake.find(str(tmp_path))

    assert [file.name for file in found.files] == ["a.FITS", "b.npy", "c.fits.gz", "d.parquet"]
    assert (found.num_ignored, found.data) == (3, None)


def test_a_dataset_is_its_shards(make_dataset, tiny, tmp_path):
    """Rows beyond those of its plan are not of it."""
    found = intake.find(make_dataset(tmp_path, tiny, num_images=10))

    assert [(file.name, file.num_rows) for file in found.files] == [
        ("part-00000.parquet", 4), ("part-00001.parquet", 4), ("part-00002.parquet", 2)
    ]  # fmt: skip
    assert found.data.num_images == 10
