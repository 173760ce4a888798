"""What pages are written with: numbers, settings and figures as HTML.

A page holds its style and its figures (SVG in data URIs) and loads nothing. A measure stands in a `<data>`
element whose value has all digits; what is shown is rounded. Text that comes out of a file is escaped.
"""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from matplotlib.figure import Figure

from raylens import figures


def fill(frame: str, *, title: str, **parts: str) -> str:
    """Return a page whose body is one of the frames beside this file, with its parts in their places."""
    folder = files("raylens")

    def filled(name: str, **parts: str) -> str:
        return Template(folder.joinpath(name).read_text(encoding="utf-8")).substitute(parts)

    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    return filled("page.html", title=title, style=style, body=filled(frame, title=title, **parts))


def drawing(figure: Figure, title: str, caption: str, alt: str) -> str:
    """Return a figure with its title and caption; `alt` says in words what is seen."""
    width = 100 * figure.get_size_inches()[0] / figures.WIDTH
    return (
        f'<figure><img src="{figures.data_uri(figure)}" alt="{escape(alt)}" style="width:{width:.0f}%">'
        f"<figcaption><b>{title}.</b> {caption}</figcaption></figure>"
    )


def cell(value: float | None, digits: int, kind: str = "", *, signed: bool = False) -> str:
    """Return a measure as a cell of a table."""
    opening = f'<td class="{kind}">' if kind else "<td>"
    return f"{opening}{number(value, digits, signed=signed)}</td>"


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Return a measure: all digits for a machine, some for a person, and a dash where there is none."""
    if value is None:
        return '<span class="none">–</span>'
    return f'<data value="{value!r}">{plain(value, digits, signed=signed)}</data>'


def plain(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Return a number as a person reads it."""
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}z,.{digits}f}".replace("-", "−")


def setting(value: Any) -> str:
    """Return a setting as a person writes it."""
    match value:
        case {"uniform": [low, high]}:
            return f"uniform from {setting(low)} to {setting(high)}"
        case {"normal": [mean, sd, low, high]}:
            return f"normal {setting(mean)} ± {setting(sd)} from {setting(low)} to {setting(high)}"
        case list() | tuple():
            return ", ".join(map(setting, value))
        case bool() | None:
            return {True: "yes", False: "no", None: "none"}[value]
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}".replace("-", "−")
    return text(value)


def text(value: Any) -> str:
    """Return what came out of a file so that it is text and nothing else."""
    return escape(str(value))


def count(number: int, noun: str) -> str:
    """Return so many of something."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float | None) -> str:
    """Return a time as a person says it."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
