"""A FITS file as astropy reads it: pixels and truth to the last bit, in the coordinates of the conventions."""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from astropy import units
from astropy.io import fits
from astropy.table import QTable
from astropy.wcs import WCS
from hypothesis import assume, given
from hypothesis import strategies as st

from raylens import dataset, export, shards, storage
from raylens.config import Simulation

NUM_IMAGES = 10  # in shards of four, four and two


@pytest.fixture(scope="module")
def simulation(tiny) -> Simulation:
    """With all that can vary varying, so that no column could stand in for another."""
    varying = {
        "lens.theta_E": {"uniform": [1.0, 1.5]},
        "lens.q": {"uniform": [0.6, 0.9]},
        "lens.phi": {"uniform": [0.0, 3.0]},
        "lens.x": {"uniform": [-1e-4, 1e-4]},  # numbers of many digits and an exponent
        "lens.y": {"uniform": [-0.2, 0.2]},
        "output.catalogue": True,
    }
    return tiny.override(varying)


@pytest.fixture(scope="module")
def data(make_dataset, simulation, tmp_path_factory) -> str:
    """A complete dataset with the subhaloes one by one."""
    return make_dataset(tmp_path_factory.mktemp("data"), simulation, NUM_IMAGES)


@pytest.fixture(scope="module")
def table(data) -> pa.Table:
    """All of it, as the dataset has it."""
    columns = ["index", "image", *shards.TRUTH, *shards.CATALOGUE]
    return pa.concat_tables(shards.read(uri, columns) for uri, _ in dataset.Dataset.open(data).parts)


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory) -> Path:
    """Images 3 to 8, which lie in all three shards."""
    path = tmp_path_factory.mktemp("exported") / "some.fits"
    export.export(data, str(path), index="3:9")
    return path


@pytest.fixture
def hdus(exported):
    """That file, open; what astropy would warn of is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fits.open(exported) as opened:
            yield opened


def headers(hdus: fits.HDUList) -> list[fits.Header]:
    return [hdu.header for hdu in hdus if hdu.name == "IMAGE"]


def test_file_is_fits_as_the_standard_has_it(hdus, exported):
    """Somebody reads it with another library than ours."""
    hdus.verify("exception")

    assert exported.stat().st_size % 2880 == 0
    assert [hdu.name for hdu in hdus] == ["PRIMARY", "SIMULATION", "SUBHALOS", *["IMAGE"] * 6]
    assert [header["EXTVER"] for header in headers(hdus)] == [1, 2, 3, 4, 5, 6]


def test_images_are_those_of_the_dataset_to_the_last_bit(hdus, table):
    """Row and column too: a transposed image looks well and is wrong."""
    for number, row in enumerate(range(3, 9), start=1):
        pixels = hdus["IMAGE", number].data

        assert hdus["IMAGE", number].header["INDEX"] == row
        assert pixels.dtype == np.dtype(">f4")
        np.testing.assert_array_equal(pixels, shards.images(table)[row])


def test_truth_in_the_header_is_the_columns_to_the_last_bit(hdus, table):
    """FITS writers like to cut numbers to twenty characters."""
    for header in headers(hdus):
        found = {column: header[keyword] for keyword, (column, _) in export.TRUTH.items()}
        wanted = {column: table[column][header["INDEX"]].as_py() for column in ["index", *shards.TRUTH]}

        assert found == wanted


def test_each_truth_with_a_unit_names_it_in_its_comment(hdus):
    """A number without unit is a guess; FITS calls the solar mass solMass."""
    comments = {keyword: headers(hdus)[0].comments[keyword] for keyword in export.TRUTH}
    named = {keyword: found[1] for keyword, text in comments.items() if (found := re.match(r"\[(.+?)\]", text))}

    assert named == {
        "THETA_E": "arcsec", "PHI": "rad", "X_LENS": "arcsec", "Y_LENS": "arcsec", "SIGMA_V": "km/s",
        "LENSMASS": "solMass", "SUBMASS": "solMass", "SUBTHETA": "arcsec",
    }  # fmt: skip


# From NASA's dictionary of the standard's keywords, https://heasarc.gsfc.nasa.gov/docs/fcg/standard_dict.html
RESERVED = (
    "AUTHOR BITPIX BLANK BLOCKED BSCALE BUNIT BZERO CDELTn COMMENT CROTAn CRPIXn CRVALn CTYPEn DATAMAX DATAMIN DATE "
    "DATE-OBS END EPOCH EQUINOX EXTEND EXTLEVEL EXTNAME EXTVER GCOUNT GROUPS HISTORY INSTRUME NAXIS NAXISn OBJECT "
    "OBSERVER ORIGIN PCOUNT PSCALn PTYPEn PZEROn REFERENC SIMPLE TBCOLn TDIMn TDISPn TELESCOP TFIELDS TFORMn THEAP "
    "TNULLn TSCALn TTYPEn TUNITn TZEROn XTENSION"
)


def test_keywords_of_the_truth_mean_nothing_else(hdus):
    """Neither to the standard, nor to what reads coordinates, nor twice."""
    header = headers(hdus)[0]
    without = header.copy()
    for keyword in export.TRUTH:
        del without[keyword]
    pattern = RESERVED.replace("n", r"\d+").replace(" ", "|")

    assert [keyword for keyword in (*export.TRUTH, *export.VARYING) if re.fullmatch(pattern, keyword)] == []
    assert len(set(header)) == len(list(header))
    assert WCS(header).to_header(relax=True) == WCS(without).to_header(relax=True)


@pytest.mark.parametrize("num_pixels", [8, 9])
def test_coordinates_are_those_of_the_conventions(make_dataset, tiny, tmp_path, num_pixels):
    """docs/conventions.md: pixel centres lie at (i - (n - 1) / 2) * pixel_scale; in the corners and in the middle."""
    scale = 0.05 / 3  # digits without end
    data = make_dataset(
        tmp_path, tiny.override({"camera.num_pixels": num_pixels, "camera.pixel_scale": scale}), num_images=1
    )
    export.export(data, str(tmp_path / "one.fits"), index="0")
    wcs = WCS(fits.getheader(tmp_path / "one.fits", "IMAGE"))
    places = np.array([0, num_pixels // 2, num_pixels - 1])
    column, row = np.meshgrid(places, places)

    x, y = wcs.pixel_to_world(column, row)

    assert (x.unit, y.unit) == (units.arcsec, units.arcsec)
    np.testing.assert_allclose(x.value, (column - (num_pixels - 1) / 2) * scale, rtol=1e-14, atol=1e-16)
    np.testing.assert_allclose(y.value, (row - (num_pixels - 1) / 2) * scale, rtol=1e-14, atol=1e-16)


def test_coordinates_claim_no_place_on_the_sky(hdus):
    """A right ascension of zero would match somebody's catalogue."""
    assert not WCS(headers(hdus)[0]).has_celestial


@pytest.mark.parametrize("normalise", [True, False])
def test_pixels_have_a_unit_that_astropy_reads(make_dataset, tiny, tmp_path, normalise):
    """CCDData refuses an image whose BUNIT it does not know; ours have none, and say of what they are a share."""
    data = make_dataset(tmp_path, tiny.override({"camera.normalise": normalise}), num_images=1)
    export.export(data, str(tmp_path / "one.fits"), index="0")

    header = fits.getheader(tmp_path / "one.fits", "IMAGE")

    assert units.Unit(header["BUNIT"]) == units.dimensionless_unscaled
    assert ("minimum 0 and maximum 1" in header.comments["BUNIT"]) is normalise


def test_the_size_of_the_source_is_told_where_it_varies(make_dataset, tiny, tmp_path):
    """Where it does not, the simulation in the first header says it."""
    varied = make_dataset(tmp_path, tiny.override({"source.sigma": {"uniform": [0.5, 1.0]}}))
    export.export(varied, str(tmp_path / "out.fits"), index="0:2")

    with fits.open(tmp_path / "out.fits") as hdus:
        told = [hdus["IMAGE", number].header["SIGMA_S"] for number in (1, 2)]
        comment = hdus["IMAGE", 1].header.comments["SIGMA_S"]

    assert told == dataset.Dataset.open(varied).read(["source_sigma"])["source_sigma"][:2].tolist()
    assert comment.startswith("[arcsec]")


def test_first_header_tells_what_made_the_dataset(hdus, data, simulation):
    """The file will be copied away from its dataset."""
    plan = dataset.read_plan(data)
    names = ("RECIPE", "SPLIT", "DIGEST", "SIMVERS", "RAYLENS", "SEED", "NIMAGES")

    assert [hdus[0].header[name] for name in names] == [
        "tiny", "train", simulation.digest, plan.simulator_version, plan.versions["raylens"], simulation.seed, 6,
    ]  # fmt: skip
    assert Simulation.parse(json.loads(hdus["SIMULATION"].data["JSON"][0])) == simulation


def test_catalogue_is_one_table_with_units(exported, table):
    """Told apart by INDEX; in the order in which the subhaloes were drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subhaloes = QTable.read(exported, hdu="SUBHALOS")

    assert {name: str(subhaloes[name].unit) for name in export.CATALOGUE} == {
        "X": "arcsec", "Y": "arcsec", "MASS": "solMass", "THETA_E": "arcsec",
    }  # fmt: skip
    for row in range(3, 9):
        own = subhaloes[subhaloes["INDEX"] == row]
        for name, column in export.CATALOGUE.items():
            np.testing.assert_array_equal(own[name].value, table[column][row].as_py())
    assert len(subhaloes) == sum(table["num_subhalos"].to_pylist()[3:9])


def test_without_catalogue_there_is_no_table_of_subhaloes(make_dataset, tiny, tmp_path):
    """Most datasets have none."""
    data = make_dataset(tmp_path, tiny, num_images=2)
    export.export(data, str(tmp_path / "two.fits"), index=":")

    with fits.open(tmp_path / "two.fits") as hdus:
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "SIMULATION", "IMAGE", "IMAGE"]


def test_each_column_of_the_dataset_has_its_keyword():
    """A column that is added must be exported too."""
    assert [column for column, _ in export.TRUTH.values()] == ["index", *shards.TRUTH]
    assert [*export.CATALOGUE.values()] == [*shards.CATALOGUE]


def test_same_range_gives_the_same_bytes(make_dataset, simulation, exported, tmp_path):
    """Also from a longer dataset at another place, in other shards: a row depends on none of this."""
    other = make_dataset(tmp_path, simulation, num_images=12, shard_size=5)

    export.export(other, str(tmp_path / "again.fits"), index="3:9")

    assert (tmp_path / "again.fits").read_bytes() == exported.read_bytes()


def test_only_the_shards_of_the_range_are_read(make_dataset, tiny, tmp_path):
    """Sixteen images of ten million should not take all day."""
    data = make_dataset(tmp_path, tiny)
    for number in (0, 2):
        os.remove(dataset.shard_uri(data, number))

    assert export.export(data, str(tmp_path / "middle.fits"), index="4:8").num_images == 4


@given(st.integers(1, 10**9), st.data())
def test_ranges_mean_what_they_mean_in_python(num_images, draw):
    """With an omitted end, and as far as they lie within the dataset."""
    first = draw.draw(st.none() | st.integers(0, num_images - 1))
    end = draw.draw(st.none() | st.integers((first or 0) + 1, num_images))
    text = ":".join("" if number is None else str(number) for number in (first, end))

    assert export.indices(text, num_images) == range(num_images)[slice(first, end)]


@given(st.integers(1, 1000), st.integers(0, 2000), st.integers(0, 2000))
def test_ranges_that_python_would_cut_are_refused(num_images, first, end):
    """Who asks for more than there is believes that there is more."""
    assume(first >= end or end > num_images)

    with pytest.raises(ValueError, match=rf"the dataset holds 0:{num_images}"):
        export.indices(f"{first}:{end}", num_images)


@pytest.mark.parametrize(
    ("index", "advice"),
    [
        ("5:5", r"holds no image.*A must be below B"),
        ("8:3", r"holds no image.*A must be below B"),
        ("3:11", r"beyond the dataset; the dataset holds 0:10"),
        ("10:", r"beyond the dataset; the dataset holds 0:10"),
        ("10", r"beyond the dataset; the dataset holds 0:10"),
        ("1-5", r"takes a range A:B.*got 1-5"),
        ("-3:", r"takes a range A:B.*got -3:"),
        ("1:9:2", r"takes a range A:B"),
        ("", r"takes a range A:B"),
        ("all", r"takes a range A:B.*the dataset holds 0:10"),
    ],
)
def test_what_is_no_range_of_the_dataset_is_one_line(main, data, tmp_path, index, advice):
    """It says what would be one."""
    ran = main("export", data, "--index", index, "--to", str(tmp_path / "new.fits"))

    assert ran.returncode == 1
    assert len(ran.errors) == 1
    assert re.search(advice, ran.errors[0])
    assert list(tmp_path.iterdir()) == []


def test_more_than_a_file_takes_is_refused_with_what_fits(data, tmp_path, monkeypatch):
    """It must be true, and not much less than would fit."""
    place, limit = str(tmp_path / "new.fits"), 60_000
    sizes = [export.export(data, place, index=f"2:{end}").bytes for end in range(3, 11)]
    monkeypatch.setattr(export, "MAX_BYTES", limit)

    with pytest.raises(ValueError, match=r"2:10 holds 8 images, and one file takes \d of them") as refused:
        export.export(data, place, index="2:")
    num_fitting = int(re.search(r"export 2:(\d+) and so on", str(refused.value))[1]) - 2

    assert sizes[num_fitting - 1] <= limit
    assert sizes[num_fitting] > 0.8 * limit


@pytest.mark.parametrize("to", ["new.fit", "new.fits.gz", "new"])
def test_only_a_fits_file_is_written(main, data, tmp_path, to):
    """Its name is how others know it."""
    ran = main("export", data, "--index", ":", "--to", str(tmp_path / to))

    assert ran.returncode == 1
    assert len(ran.errors) == 1
    assert "must end in .fits" in ran.errors[0]
    assert list(tmp_path.iterdir()) == []


def test_damaged_shard_is_named_and_nothing_is_written(main, make_dataset, tiny, tmp_path):
    """Half a file, or one of pixels that nobody simulated, is worse than none."""
    data = make_dataset(tmp_path / "data", tiny)
    path = Path(dataset.shard_uri(data, 1))
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)

    ran = main("export", data, "--index", ":", "--to", str(tmp_path / "out" / "new.fits"))

    assert ran.returncode == 1
    assert len(ran.errors) == 1
    assert re.search(r"part-00001\.parquet cannot be read: .*raylens verify", ran.errors[0])
    assert not (tmp_path / "out").exists()


def test_verb_ends_with_its_facts(main, data, exported, tmp_path):
    """A script goes on with the file that they name."""
    ran = main("export", data, "--index", "3:9", "--to", str(tmp_path / "new.fits"))

    assert ran.returncode == 0
    assert (ran.facts["fits"], ran.facts["num_images"]) == (str(tmp_path / "new.fits"), 6)
    assert ran.facts["images_per_second"] == pytest.approx(6 / ran.facts["seconds"])
    assert Path(ran.facts["fits"]).read_bytes() == exported.read_bytes()


def test_from_s3_and_to_s3(main, make_dataset, simulation, exported, s3):
    """The same file as from a local dataset."""
    data = make_dataset(f"{s3}/export", simulation, NUM_IMAGES)

    ran = main("export", data, "--index", "3:9", "--to", f"{s3}/export/some.fits")

    assert ran.facts["fits"] == f"{s3}/export/some.fits"
    assert storage.read(ran.facts["fits"]) == exported.read_bytes()
