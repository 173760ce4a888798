"""The results that docs/results tells: whether page and tables are those of the committed files, made as they say."""

import json
import re
import runpy
from pathlib import Path

import pytest

from raylens import paper, recipes
from raylens.config import Experiment

HERE = Path(__file__).parents[1] / "docs" / "results"
DRAW = runpy.run_path(str(HERE / "draw.py"))
RESULTS = DRAW["results"]()
MEASURES = ("gradient", "sigma", "rmse")


def numbers(values) -> set[float]:
    """All numbers in nested dictionaries and lists."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return set().union(*map(numbers, values))
    return {float(values)} if isinstance(values, (int, float)) else set()


def test_the_page_is_that_of_the_results():
    assert (HERE / "index.html").read_text() == DRAW["page"]()


def test_each_measure_on_the_page_is_in_the_results_or_the_papers_or_their_ratio():
    """The page is what people quote."""
    known = numbers(RESULTS)
    for one in RESULTS.values():
        entry = DRAW["varied"](one)
        for name, constant in (("n_cnn", "n_constant"), ("alpha_cnn", "alpha_constant")):
            ours, alone = entry[name]["rmse"], entry["baselines"]
            known |= {ours / baseline["rmse"] for baseline in alone.values()}
            known.add(1 - ours**2 / (alone[constant]["rmse"] ** 2 - alone[constant]["bias"] ** 2))
        for name, table in paper.tables(one["simulation"]).items():
            for entry in one["datasets"]:
                theirs = table.measures[entry["alpha"]]
                known |= numbers(theirs)
                known |= {
                    entry[name][measure] / theirs[measure]
                    for measure in MEASURES
                    if theirs[measure] and entry[name][measure] is not None
                }

    shown = {float(value) for value in re.findall(r'<data value="([^"]+)">', (HERE / "index.html").read_text())}

    assert len(shown) > 100
    assert shown <= known


def test_the_figures_are_those_of_the_records():
    for name, content in DRAW["drawings"]().items():
        assert (HERE / name).read_bytes() == content


def test_the_tables_are_those_of_the_results():
    text = (HERE / "README.md").read_text()

    assert text.count("<!-- ") == len(DRAW["tables"]())
    assert text == DRAW["readme"]()


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_of_the_recipe_beside_them(name):
    """Whoever runs it again must get the same experiment."""
    experiment = recipes.load(str(HERE / "recipes" / f"{name}.toml"))

    assert Experiment.parse(RESULTS[name]["experiment"]) == experiment
    assert RESULTS[name]["digest"] == experiment.simulation.digest


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_of_networks_that_validation_chose(name):
    """And of test sets that are neither trained nor validated on."""
    one = RESULTS[name]
    for network in ("n_cnn", "alpha_cnn"):
        card = one[network]
        assert card["epoch"] == min(card["history"], key=lambda record: record["validation_loss"])["epoch"]
        assert len(card["history"]) == card["training"]["num_epochs"] >= 10
        assert {card["dataset"], card["validation_dataset"]}.isdisjoint(entry["dataset"] for entry in one["datasets"])
    assert all(entry["split"].startswith("test") for entry in one["datasets"])


def test_no_result_tells_of_the_machine_that_made_it():
    """Places are as below the root that was given."""
    for place in HERE.rglob("*.json"):
        assert not re.search(r'"/[a-z]+/', place.read_text()), place


@pytest.mark.parametrize("name", [name for name in RESULTS if name.startswith("paper-")])
def test_no_error_as_written_is_larger_than_the_papers(name):
    """README.md says so."""
    for network, table in paper.tables(RESULTS[name]["simulation"]).items():
        for entry in RESULTS[name]["datasets"]:
            for measure in ("sigma", "rmse"):
                assert entry[network][measure] <= table.measures[entry["alpha"]][measure]


def test_the_four_tables_are_at_the_papers_scale():
    for name in ("paper-fixed", "paper-fixed-coarse", "paper-varied"):
        one = RESULTS[name]
        assert one["n_cnn"]["num_training_images"] == one["alpha_cnn"]["num_training_images"] == 100_000
        assert [entry["num_images"] for entry in one["datasets"]] == [20_000, *[5_000] * 5]
    assert json.loads((HERE / "paper-varied.json").read_text())["datasets"][0]["alpha_cnn_true_n"]
