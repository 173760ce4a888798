"""Keep the results of experiments here, and draw from them the page, the figures and the tables of README.md.

python docs/results/draw.py            # from the results that lie here
python docs/results/draw.py ROOT       # before that, take over those of `raylens reproduce ... --to ROOT`

A table of README.md stands below a comment with its name.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from raylens import figures, paper, report, storage

HERE = Path(__file__).parent
READINGS = ("paper-fixed", "paper-fixed-coarse", "paper-varied", "coded-fixed", "coded-fixed-coarse", "coded-varied")

Results = dict[str, Any]


def keep(root: str) -> None:
    """Copy each experiment's results.json, with places as they are below the root."""
    root = storage.absolute(root)
    places = [storage.join(root, name, "results.json") for name in sorted(storage.names(root))]
    texts = [storage.read(place).decode() for place in places if storage.exists(place)]
    if not texts:
        raise ValueError(f"{root} holds no experiment's folder with a results.json.")
    for text in texts:
        text = text.replace(f"{root}/", "")
        (HERE / f"{json.loads(text)['recipe']}.json").write_text(text)


def results() -> dict[str, Results]:
    """Return the results that lie here, by the name of their experiment."""
    return {place.stem: json.loads(place.read_text()) for place in sorted(HERE.glob("*.json"))}


def bias() -> Results | None:
    """Return what the experiment on the N-CNN's bias found."""
    place = HERE / "bias" / "bias.json"
    return json.loads(place.read_text()) if place.exists() else None


def page() -> str:
    """Return the page on both readings of the paper."""
    found = results()
    return report.report([found[name] for name in READINGS if name in found])


def tables() -> dict[str, str]:
    """Return the tables of README.md, by what they are on."""
    found = results()
    readings = {name: found[name] for name in READINGS if name in found}
    tenths = {name: one for name, one in found.items() if name.startswith("tenth-")}
    raw = {name: one for name, one in found.items() if name.startswith("raw-")}
    scalings = {name: found[name] for one in raw for name in (one.replace("raw", "paper"), one)}
    drawn = {
        "readings, N": _table(readings, _of_n(paper_too=True)),
        "readings, alpha": _table(readings, _of_alpha(paper_too=True)),
        "sensitivity": _table(tenths, _of_n() + _of_alpha()),
        "scalings": _table(scalings, _of_scalings()),
        "modes": _modes(),
        "cost": _table(found, _of_cost()),
    }
    return {name: "\n".join(lines) for name, lines in drawn.items() if len(lines) > 2}


def readme() -> str:
    """Return README.md with its tables as they follow from the results."""
    drawn = tables()
    return re.sub(
        r"(<!-- (.+?) -->\n)(?:\|.*\n)*",
        lambda place: f"{place[1]}{drawn[place[2]]}\n",
        (HERE / "README.md").read_text(),
    )


# A heading, and what stands under it for an experiment.
Column = tuple[str, Callable[[Results], str]]


def _of_n(*, paper_too: bool = False) -> list[Column]:
    return [
        ("N: RMSE", lambda one: f"{varied(one)['n_cnn']['rmse']:.1f}"),
        *([("paper", lambda one: _paper(one, "n_cnn"))] if paper_too else []),
        ("RMSE / sd", lambda one: f"{varied(one)['n_cnn']['relative_rmse']:.3f}"),
        ("gradient", lambda one: f"{varied(one)['n_cnn']['gradient']:.3f}"),
        ("constant", lambda one: f"{varied(one)['baselines']['n_constant']['rmse']:.0f}"),
        ("ring", lambda one: f"{varied(one)['baselines']['n_from_ring']['rmse']:.1f}"),
    ]


def _of_alpha(*, paper_too: bool = False) -> list[Column]:
    def alone(baseline: str) -> Callable[[Results], str]:
        return lambda one: f"{varied(one)['baselines'][baseline]['rmse']:.3f}"

    return [
        ("alpha: RMSE", lambda one: f"{varied(one)['alpha_cnn']['rmse']:.3f}"),
        *([("paper", lambda one: _paper(one, "alpha_cnn"))] if paper_too else []),
        ("RMSE / sd", lambda one: f"{varied(one)['alpha_cnn']['relative_rmse']:.3f}"),
        ("gradient", lambda one: f"{varied(one)['alpha_cnn']['gradient']:.3f}"),
        ("given true N: RMSE", lambda one: f"{varied(one)['alpha_cnn_true_n']['rmse']:.3f}"),
        *([("paper", lambda one: _paper(one, "alpha_cnn_true_n"))] if paper_too else []),
        ("gradient", lambda one: f"{varied(one)['alpha_cnn_true_n']['gradient']:.3f}"),
        ("constant", alone("alpha_constant")),
        ("true N", alone("alpha_from_true_n")),
        ("true N + mass", alone("alpha_from_true_n_and_mass")),
        ("ring", alone("alpha_from_ring")),
    ]


def _of_scalings() -> list[Column]:
    return [
        ("N: RMSE", lambda one: f"{varied(one)['n_cnn']['rmse']:.1f}"),
        ("bias", lambda one: f"{varied(one)['n_cnn']['bias']:+.1f}"),
        ("gradient", lambda one: f"{varied(one)['n_cnn']['gradient']:.3f}"),
        ("constant", lambda one: f"{varied(one)['baselines']['n_constant']['rmse']:.0f}"),
        ("epoch kept", lambda one: f"{one['n_cnn']['epoch']} of {len(one['n_cnn']['history'])}"),
        ("alpha: RMSE", lambda one: f"{varied(one)['alpha_cnn']['rmse']:.3f}"),
        ("bias", lambda one: f"{varied(one)['alpha_cnn']['bias']:+.3f}"),
        ("gradient", lambda one: f"{varied(one)['alpha_cnn']['gradient']:.3f}"),
        ("constant", lambda one: f"{varied(one)['baselines']['alpha_constant']['rmse']:.3f}"),
    ]


def _of_cost() -> list[Column]:
    def hours(one: Results, key: str, stages: str) -> float:
        return sum(stage[key] for stage in one["stages"] if stage["stage"].startswith(stages)) / 3600

    return [
        ("training images", lambda one: f"{one['n_cnn']['num_training_images']:,}"),
        ("epochs", lambda one: f"{one['n_cnn']['training']['num_epochs']}"),
        ("N-CNN, images/s", lambda one: f"{one['n_cnn']['metrics']['images_per_second']:,.0f}"),
        ("alpha-CNN, images/s", lambda one: f"{one['alpha_cnn']['metrics']['images_per_second']:,.0f}"),
        ("hours", lambda one: f"{hours(one, 'seconds', ''):.2f}"),
        ("CPU-hours", lambda one: f"{hours(one, 'cpu_seconds', ''):.2f}"),
        ("of that simulating", lambda one: f"{hours(one, 'cpu_seconds', 'simulate'):.3f}"),
    ]


def varied(one: Results) -> Results:
    """Return what was measured where alpha varies."""
    return next(entry for entry in one["datasets"] if entry["alpha"] is None)


def _paper(one: Results, network: str) -> str:
    table = paper.tables(one["simulation"]).get(network)
    return str(table.measures[None]["rmse"]) if table else "-"


def _table(experiments: dict[str, Results], columns: list[Column]) -> list[str]:
    """Return the lines of a table with a row for each experiment."""
    rows = [[name, *(value(one) for _, value in columns)] for name, one in experiments.items()]
    return _lines([["experiment", *(title for title, _ in columns)], *rows])


def _modes() -> list[str]:
    """Return the lines of a table of the bias of N in each mode, after the last epoch of each scaling."""
    found = bias()
    if found is None:
        return []
    rows = [
        [
            name,
            f"{last['training_rmse']:.1f}",
            *(f"{last[mode]['bias']:+.1f}" for mode in found["modes"]),
            *(f"{last[mode]['pulls_up']:.0f} - {-last[mode]['pulls_down']:.0f}" for mode in ("training", "evaluation")),
        ]
        for name, last in ((name, epochs[-1]) for name, epochs in found["variants"].items())
    ]
    pulls = ["features pull, training", "evaluation"]
    return _lines([["labels", "training error", *found["modes"], *pulls], *rows])


def _lines(rows: list[list[str]]) -> list[str]:
    head, *below = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|---" * len(rows[0]) + "|", *below]


def drawings() -> dict[str, bytes]:
    """Return the figures of README.md as SVG, by the name of their file."""
    found = bias()
    return {"bias/bias.svg": figures.svg(_bias_by_epoch(found))} if found else {}


@figures.styled
def _bias_by_epoch(found: Results) -> Figure:
    """The bias of N in each mode, epoch by epoch, for each scaling of N."""
    figure = Figure(figsize=(figures.WIDTH, 2.6), layout="constrained")
    panels = figure.subplots(1, len(found["variants"]), sharey=True)
    lines = [(figures.PAPER, "--"), (figures.GREY, ":"), ("#009E73", "-."), (figures.OURS, "-")]
    shown = dict(zip(found["modes"], lines, strict=True))
    for axes, (name, epochs) in zip(panels, found["variants"].items(), strict=True):
        numbers = [record["epoch"] for record in epochs]
        for mode, (colour, line) in shown.items():
            biases = [record[mode]["bias"] for record in epochs]
            axes.plot(numbers, biases, color=colour, linestyle=line, marker="o", markersize=3, label=mode)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(title=name, xlabel="epoch")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    panels[0].set_ylabel("bias of $N$")
    panels[-1].legend()
    return figure


if __name__ == "__main__":
    for root in sys.argv[1:]:
        keep(root)
    (HERE / "index.html").write_text(page())
    for name, content in drawings().items():
        (HERE / name).write_bytes(content)
    (HERE / "README.md").write_text(readme())
