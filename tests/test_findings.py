"""The page of a campaign: whether what it says is what the record says, and follows from it."""

import io
import itertools
import json
import re

import pytest
from pages import Page, shown
from rich.console import Console
from test_cli import assert_refused

from raylens import recipes
from raylens.campaign import Campaign, Tried
from raylens.cli import _Leaderboard
from raylens.config import Search
from raylens.findings import findings
from raylens.search import load

EPOCHS = (2, 8)
VALUES = {
    "optimizer": ["adam", "nadam"],
    "learning_rate": [1e-4, 1e-3, 1e-2],
    "batch_size": [16, 32],
    "kernel_size": [3, 5],
}
REFERENCE = {"optimizer": "nadam", "learning_rate": 1e-4, "batch_size": 16, "kernel_size": 3}
EFFECT = {1e-4: 10.0, 1e-3: 40.0, 1e-2: 160.0}  # of the learning rate; all else matters little


pytestmark = pytest.mark.usefixtures("undrawn")


def tried(number, config, values, status="completed", reason=None):
    """A trial whose metric took these values."""
    metric = min(values, default=None)
    return Tried(
        id=f"{number:05}",
        config=config,
        status=status,
        reason=reason,
        metric=metric,
        epoch=values.index(metric) + 1 if values else None,
        epochs=len(values),
        values=tuple(values),
        seconds=10.0 * len(values),
    )


def trials():
    """A trial for each configuration; the learning rate decides, and the worse half is stopped."""
    for number, values in enumerate(itertools.product(*VALUES.values())):
        config = dict(zip(VALUES, values, strict=True))
        level = EFFECT[config["learning_rate"]] * (1 + number / 1000)
        stopped = config["learning_rate"] == 1e-2
        num_epochs = EPOCHS[0] if stopped else EPOCHS[1]
        curve = [level * (1 + 1 / epoch) for epoch in range(1, num_epochs + 1)]
        yield tried(number, config, curve, "stopped" if stopped else "completed")


def campaign(**changes) -> Campaign:
    """A campaign that tried a whole grid."""
    told = tuple(changes.pop("trials", trials()))
    ranked = sorted((trial for trial in told if trial.metric is not None), key=lambda trial: trial.metric)
    search = Search.parse(
        {"name": "some", "network": "n-cnn", "recipe": "paper-fixed", "epochs": list(EPOCHS), "values": VALUES}
    )
    facts = {
        "search": search,
        "searcher": "asha",
        "base": recipes.load("paper-fixed").n_cnn,
        "num_trials": 24,
        "dataset": "data/some-train-00000000",
        "dataset_digest": "00000000",
        "validation_dataset": None,
        "num_pixels": 60,
        "num_training_images": 900,
        "num_validation_images": 100,
        "num_possible": 24,
        "left_out": {},
        "reference": REFERENCE,
        "trials": told,
        "best": ranked[0] if ranked else None,
        "seconds": 1000.0,
        "cpu_seconds": 1800.0,
        "busy": 0.9,
        "num_slots": 2,
        "versions": {"raylens": "0.1.0"},
    }
    return Campaign(**(facts | changes))


def text(page: str) -> str:
    """What a person reads, in one line."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", page))


def test_the_leaderboard_of_the_papers_space_fits_a_terminal():
    """Cells that are cut cannot be told apart."""
    space = load("paper-n-cnn")
    longest = {name: max(values, key=lambda value: len(str(value))) for name, values in space.values.items()}
    configs = [{**longest, "num_layers": num_layers, "filters": 8, "growth": 2} for num_layers in (5, 4)]
    record = campaign(search=space, trials=[tried(k, configs[k], [21.34567 + k]) for k in range(2)], reference=None)
    console = Console(width=80, file=io.StringIO())

    console.print(_Leaderboard().table(record, "how far it is"))

    told = console.file.getvalue()
    assert "…" not in told
    row = ["00001", "nadam", "0.0001", "16", "11", "8-16-32-64", "completed", "1", "22.35"]
    assert [line.split() for line in told.splitlines()][-1] == row


def test_the_leaderboard_is_the_record_best_first():
    record = campaign()
    rows = Page(findings(record)).table("RMSE of N on the validation images")

    assert len(rows) == 20
    for rank, (row, trial) in enumerate(zip(rows, record.ranked(), strict=False), start=1):
        told = [cell[0] for cell in row]
        assert told[:2] == [str(rank), trial.id + (" (recipe)" if trial.config == REFERENCE else "")]
        assert told[2:6] == [
            trial.config["optimizer"],
            f"{trial.config['learning_rate']:.4g}",
            str(trial.config["batch_size"]),
            str(trial.config["kernel_size"]),
        ]
        assert told[6:8] == [str(trial.epochs), str(trial.epoch)]
        assert row[8][1] == trial.metric == pytest.approx(shown(row[8]), abs=0.0501)
    assert sum("(recipe)" in row[1][0] for row in rows) == 1
    assert "and 4 others" in findings(record)


def test_settings_are_compared_after_the_epochs_that_all_trials_had():
    """One that was stopped would else look worse for having been stopped."""
    record = campaign()
    rows = Page(findings(record)).table("RMSE of N after 2 epochs")

    assert [row[2][0] for row in rows] == ["adam", "nadam", "0.0001", "0.001", "0.01", "16", "32", "3", "5"]
    for row, rate in zip(rows[2:5], EFFECT, strict=True):
        after = [min(trial.values[:2]) for trial in record.trials if trial.config["learning_rate"] == rate]
        assert row[3][0] == str(len(after))
        assert row[7][1] == min(after)
        assert min(after) < row[5][1] < row[4][1] < row[6][1] < max(after)


def test_what_decides_has_the_largest_importance():
    """The learning rate was planted to change the metric sixteenfold, and all else to hardly change it."""
    page = findings(campaign())
    rows = Page(page).table("RMSE of N after 2 epochs")
    importances = {row[0][0]: row[1][1] for row in rows if row[0][0]}

    assert list(importances) == ["optimizer", "learning rate", "batch size", "kernel size"]
    assert sum(importances.values()) == pytest.approx(100)
    assert importances["learning rate"] > 90
    assert "What matters most: learning rate (" in text(page)


def test_the_rank_of_the_papers_choice_is_told():
    record = campaign()
    rank = next(place for place, trial in enumerate(record.ranked(), start=1) if trial.config == REFERENCE)
    told = text(findings(record))

    assert f"rank {rank} of 24, and {rank} of 24 after 2 epochs" in told
    assert record.ranked()[rank - 1].config == REFERENCE
    assert "are not in this space" in text(findings(campaign(reference=None)))
    untried = [trial for trial in trials() if trial.config != REFERENCE]
    assert "were not tried" in text(findings(campaign(trials=untried)))


def test_layers_are_told_as_their_filters():
    """As the paper writes them; three numbers that multiply say less."""
    values = {"learning_rate": [1e-4, 1e-3], "num_layers": [1, 2, 3], "filters": [8, 16, 32], "growth": [1, 2]}
    search = campaign().search.override({"values": values})
    config = {"learning_rate": 1e-3, "num_layers": 3, "filters": 8, "growth": 2}
    record = campaign(search=search, trials=[tried(0, config, [3.0, 2.0])], reference=None)

    assert "learning rate 0.001, filters 8-16-32, with RMSE of N 2.0 after epoch 2 of 2" in text(findings(record))


NONE_ENDED = [tried(0, REFERENCE, [], "failed", "ran out of memory"), tried(1, REFERENCE, [], "running")]
ONE = [tried(0, REFERENCE, [5.0])]


@pytest.mark.parametrize(
    ("told", "says"),
    [([], "None has come to the end of an epoch"), (NONE_ENDED, "ran out of memory"), (ONE, "rank 1 of 1")],
    ids=["nothing yet", "none ended", "one epoch of one"],
)
def test_a_campaign_that_has_hardly_begun_has_a_page(drawn, told, says):
    page = findings(campaign(trials=told))

    assert says in text(page)
    assert not re.search(r"\bnan\b", text(page))


def test_a_population_is_told_apart():
    """Of a population the settings change on the way, so that what they explain is another matter."""
    assert "that a trial ended with" in text(findings(campaign(searcher="pbt")))
    assert "that a trial ended with" not in text(findings(campaign()))


def test_text_out_of_a_file_stays_text():
    """A campaign may come from anybody."""
    planted = "<script>alert(1)</script>"
    told = [tried(0, REFERENCE, [5.0]), tried(1, REFERENCE, [], "failed", planted)]
    page = findings(campaign(trials=told, dataset=planted, left_out={planted: 3}, versions={planted: planted}))

    assert "script" not in Page(page).tags
    assert page.count("&lt;script&gt;") >= 5


def test_a_page_loads_nothing_and_is_the_same_each_time(drawn):
    """It is read without a network, years later, and kept in a repository."""
    first, second = findings(campaign()), findings(campaign())
    page = Page(first)

    assert first == second
    assert page.loaded
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.loaded)
    assert all(page.alts)
    assert page.tags.count("figure") == 3


def test_the_verb_report_reads_a_campaign(main, tmp_path):
    place, to = tmp_path / "campaign.json", tmp_path / "page.html"
    place.write_text(json.dumps(campaign().as_dict()))

    ran = main("report", str(place), "--to", str(to))

    assert ran.returncode == 0
    assert "(recipe)" in to.read_text()


def test_a_broken_campaign_is_refused_in_one_line(main, tmp_path):
    place = tmp_path / "campaign.json"
    place.write_text(json.dumps(campaign().as_dict() | {"trials": [{"id": "00000"}]}))

    assert_refused(
        main("report", str(place), "--to", str(tmp_path / "page.html")), "campaign.json does not describe a campaign"
    )
