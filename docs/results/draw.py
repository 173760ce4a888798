"""Keep the results of experiments here, and draw the page and the tables of README.md from them.

python docs/results/draw.py            # the page and the tables, from the results that lie here
python docs/results/draw.py ROOT       # before that, take over those of `raylens reproduce ... --to ROOT`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raylens import paper, report

HERE = Path(__file__).parent
# The experiments of the page; the others are read beside them, in the tables of README.md.
READINGS = ("paper-fixed", "paper-fixed-coarse", "paper-varied", "coded-fixed", "coded-fixed-coarse", "coded-varied")


def keep(root: str) -> None:
    """Copy each experiment's results.json, with places as they are below the root."""
    for place in sorted(Path(root).glob("*/results.json")):
        text = place.read_text().replace(f"{Path(root).absolute()}/", "")
        (HERE / f"{json.loads(text)['recipe']}.json").write_text(text)


def results() -> dict[str, dict[str, Any]]:
    """Return the results that lie here, by the name of their experiment."""
    return {place.stem: json.loads(place.read_text()) for place in sorted(HERE.glob("*.json"))}


def page() -> str:
    """Return the page on both readings of the paper."""
    found = results()
    return report.report([found[name] for name in READINGS if name in found])


def varied(one: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured where alpha varies."""
    return next(entry for entry in one["datasets"] if entry["alpha"] is None)


def overview(names: list[str]) -> Iterator[str]:
    """Yield a table of RMSEs where alpha varies: the networks', the paper's, and what needs no image."""
    yield "| experiment | N | paper | ring alone | alpha | paper | given true N | true N, mass alone | ring alone |"
    yield "|---" * 9 + "|"
    for name in names:
        one = results()[name]
        entry, tables = varied(one), paper.tables(one["simulation"])
        theirs = {network: table.measures[None]["rmse"] for network, table in tables.items()}
        alone = {baseline: entry["baselines"][baseline]["rmse"] for baseline in entry["baselines"]}
        yield (
            f"| {name} | {entry['n_cnn']['rmse']:.1f} | {theirs['n_cnn']} | {alone['n_from_ring']:.1f} "
            f"| {entry['alpha_cnn']['rmse']:.3f} | {theirs['alpha_cnn']} | {entry['alpha_cnn_true_n']['rmse']:.3f} "
            f"| {alone['alpha_from_true_n_and_mass']:.3f} | {alone['alpha_from_ring']:.3f} |"
        )


if __name__ == "__main__":
    for root in sys.argv[1:]:
        keep(root)
    (HERE / "index.html").write_text(page())
    print(*overview(list(results())), sep="\n")
