"""Draw the figures and print the tables of docs/search.md from the records that lie here.

python docs/campaigns/draw.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raylens import campaign as campaigns
from raylens import figures
from raylens.campaign import Campaign
from raylens.findings import learning_curves, marginal_effects
from raylens.search import spelled_out

HERE = Path(__file__).parent
DRAWINGS = {"effects.svg": marginal_effects, "curves.svg": learning_curves}
NUM_SHOWN = 5


def records() -> dict[str, Campaign]:
    """Return the record of each campaign, by the name of its folder."""
    found = {place.parent.name: campaigns.read(str(place.parent)) for place in sorted(HERE.glob("*/campaign.json"))}
    return {name: record for name, record in found.items() if record is not None}


def drawings(record: Campaign) -> dict[str, bytes]:
    """Return the figures of a campaign as SVG, by the name of their file."""
    return {name: figures.svg(draw(record)) for name, draw in DRAWINGS.items()}


def table(record: Campaign) -> Iterator[str]:
    """Yield the lines of a table of the best trials, and of the recipe's own settings."""
    names = list(spelled_out(record.search, record.trials[0].config))
    yield f"| rank | {' | '.join(name.replace('_', ' ') for name in names)} | epochs | RMSE | time |"
    yield "|---" * (len(names) + 4) + "|"
    for rank, trial in enumerate(record.ranked(), start=1):
        if rank <= NUM_SHOWN or trial.config == record.reference:
            values = map(str, spelled_out(record.search, trial.config).values())
            whose = " (the paper's choice)" if trial.config == record.reference else ""
            minutes = f"{trial.seconds / 60:.1f} min"
            yield f"| {rank}{whose} | {' | '.join(values)} | {trial.epochs} | {trial.metric:.4g} | {minutes} |"


if __name__ == "__main__":
    for name, record in records().items():
        for file, content in drawings(record).items():
            (HERE / name / file).write_bytes(content)
        print(*table(record), sep="\n", end="\n\n")
