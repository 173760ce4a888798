"""What a dataset says of itself: its card, README.md, in Markdown with the front matter that dataset hubs read."""

from __future__ import annotations

from raylens import shards
from raylens.dataset import Entry, Plan


def card(plan: Plan, entries: list[Entry], statistics: dict[str, shards.Statistics]) -> str:
    """Return the card of a dataset: what it holds, how it was made and how it is read."""
    columns = "\n".join(
        f"| `{field.name}` | {field.type} | " + " | ".join(text.decode() for text in field.metadata.values()) + " |"
        for field in shards.schema(plan.simulation)
    )
    megabytes = sum(entry.bytes for entry in entries) / 1e6
    scale = plan.simulation.camera.pixel_scale
    return f"""---
pretty_name: {plan.recipe} {plan.split} {plan.digest}
configs:
- config_name: default
  data_files: part-*.parquet
---
# {plan.recipe}, split {plan.split}, digest {plan.digest}

{plan.num_images:,} simulated strong lenses with subhaloes, in {len(entries)} files ({megabytes:,.1f} MB).
Made by raylens {plan.versions.get("raylens", "")}, simulator version {plan.simulator_version}.
Every row is a function of the simulation in `dataset.json`, the split and its `index`.
`raylens verify` checks the files.

| column | type | unit | meaning |
|---|---|---|---|
{columns}

`image[row, column]`: y grows with row and x with column; pixel centres lie at (i - (n - 1) / 2) x {scale} arcsec.
"""
