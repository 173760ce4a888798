"""The campaigns whose findings docs/search.md tells: whether figures and tables are those of their records."""

import runpy
from pathlib import Path

import pytest

from raylens import search

DOCS = Path(__file__).parents[1] / "docs"
DRAW = runpy.run_path(str(DOCS / "campaigns" / "draw.py"))


@pytest.fixture(scope="module", params=["n-cnn", "alpha-cnn"])
def campaign(request):
    return DOCS / "campaigns" / request.param, DRAW["records"]()[request.param]


def test_the_figures_are_those_of_the_record(campaign):
    folder, record = campaign

    for name, content in DRAW["drawings"](record).items():
        assert (folder / name).read_bytes() == content


def test_the_table_is_that_of_the_record(campaign):
    _, record = campaign

    assert "\n".join(DRAW["table"](record)) in (DOCS / "search.md").read_text()


def test_the_campaign_asked_what_the_papers_choice_is_worth(campaign):
    """On images of 30 x 30 pixels, a tenth of 20,000 held out."""
    folder, record = campaign

    assert record.reference_rank() is not None
    assert (record.num_pixels, record.num_training_images + record.num_validation_images) == (30, 20_000)
    assert search.load(str(folder / "space.toml")) == record.search
