"""Figures of a report: what results.json holds of them, drawn as the paper's figures 1 to 8.

Each function returns a matplotlib figure; nothing is simulated or predicted here. Colours are those of
Okabe and Ito, or run from light to dark, so that they survive colour-blindness and a grey printer.
Lengths are in arcsec and masses in solar masses; images have y growing upwards.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

OURS, PAPER, GREY = "#0072B2", "#D55E00", "#666666"

LOSSES = {"mse": "mean squared", "mae": "mean absolute"}
TARGETS = {"n-cnn": "N", "alpha-cnn": r"$\alpha$"}  # as a network's output is written

_STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a page looks the same wherever it is made
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "svg.fonttype": "path",
    "svg.hashsalt": "raylens",  # the same results, the same bytes
}
WIDTH = 9.2  # inch; shown at 1080 px on a laptop and 180 mm on A4

# What each number of `truth` is called, and the settings that let it vary.
QUANTITIES = {
    "theta_E": (r"Einstein radius $\theta_E$ [arcsec]", "lens", "theta_E"),
    "q": (r"axis ratio $q$", "lens", "q"),
    "phi": (r"orientation $\phi$ [rad]", "lens", "phi"),
    "x": (r"lens centre $x$ [arcsec]", "lens", "x"),
    "y": (r"lens centre $y$ [arcsec]", "lens", "y"),
    "z_source": ("source redshift", "source", "z"),
    "alpha": (r"slope $\alpha$", "subhalos", "alpha"),
}

# The slopes of figure 2, as far as a simulation can be drawn at them.
SLOPES = (-2.4, -2.0, -1.6)

_Curves = dict[float | None, dict[str, float | None]]  # alpha (None: varied) -> the paper's measures


def svg(figure: Figure) -> bytes:
    """Return a figure as SVG; what is dense in it is a bitmap inside."""
    with mpl.rc_context(_STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", dpi=150, metadata={"Date": None})
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """Return a figure as SVG in a data URI."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(figure)).decode()


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Return what draws a figure so that it draws it in the style of all of them."""

    @wraps(draw)
    def drawn(*arguments: Any, **keywords: Any) -> Figure:
        with mpl.rc_context(_STYLE):
            return draw(*arguments, **keywords)

    return drawn


@styled
def distributions(truth: dict[str, Any], simulation: dict[str, Any]) -> Figure:
    """Figure 1: number densities of what varies from lens to lens, and of N."""
    varying = [name for name in truth if name in QUANTITIES and varies(name, simulation)]
    names = [*varying, "num_subhalos"]
    num_columns = min(len(names), 4)
    num_rows = math.ceil(len(names) / num_columns)
    width = WIDTH if num_columns > 2 else 0.36 * WIDTH * num_columns
    figure = Figure(figsize=(width, 1.95 * num_rows), layout="constrained")
    for place, name in enumerate(names):
        axes = figure.add_subplot(num_rows, num_columns, place + 1)
        edges, density = _density(truth[name], sum(truth[name]["counts"]), merge=2)
        axes.stairs(density, edges, fill=True, color=OURS, alpha=0.25)
        axes.stairs(density, edges, color=OURS, linewidth=1)
        axes.set_xlabel(QUANTITIES[name][0] if name in QUANTITIES else r"number of subhaloes $N$")
        axes.set_ylim(0, 1.12 * density.max())
        axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4))
        if place % num_columns == 0:
            axes.set_ylabel("probability density")
    return figure


def varies(name: str, simulation: dict[str, Any]) -> bool:
    """Return whether a quantity of figure 1 is drawn from a distribution."""
    _, group, key = QUANTITIES[name]
    return isinstance(simulation[group][key], dict)


def slopes(illustration: dict[str, Any]) -> list[float]:
    """Return the slopes that figure 2 can show, the steepest first."""
    return sorted({round(population["alpha"], 1) for population in illustration["populations"]} & set(SLOPES))


@styled
def populations(illustration: dict[str, Any], simulation: dict[str, Any]) -> Figure:
    """Figure 2: the masses of the subhaloes of one lens at each of `slopes`, and where they lie."""
    shown = [population for population in illustration["populations"] if round(population["alpha"], 1) in SLOPES]
    shown.sort(key=lambda population: population["alpha"])
    mass_max = simulation["subhalos"]["mass_max"]
    reach = 1.06 * max(max(map(abs, [*population["x"], *population["y"]]), default=1) for population in shown)
    figure = Figure(figsize=(WIDTH * len(shown) / len(SLOPES), 5.4), layout="constrained")
    panels = figure.subplots(2, len(shown), sharey="row", height_ratios=[1, 1.45], squeeze=False)
    for column, population in enumerate(shown):
        masses, alpha = np.array(population["mass"]), population["alpha"]
        axes = panels[0][column]
        edges, shares = _mass_function(simulation["subhalos"], alpha)
        axes.stairs(np.histogram(masses, edges)[0], edges, fill=True, color=OURS, alpha=0.25)
        axes.stairs(np.histogram(masses, edges)[0], edges, color=OURS, linewidth=1)
        axes.plot(np.sqrt(edges[1:] * edges[:-1]), len(masses) * shares, color="black", linestyle="--", linewidth=1)
        axes.set(xscale="log", yscale="log", ylim=(0.5, None), xlabel=r"subhalo mass [M$_\odot$]")
        total = rf"{masses.sum() / 1e12:.2f} \times 10^{{12}}"
        axes.set_title(rf"$\alpha = {alpha:.1f}$:  $N = {len(masses)}$, in all ${total}$ M$_\odot$")
        axes = panels[1][column]
        area = np.clip(
            60 * (masses / mass_max) ** (2 / 3), 0.4, None
        )  # an Einstein radius grows as M^(2/3); this as its square root
        axes.scatter(population["x"], population["y"], s=area, color=OURS, alpha=0.75, linewidths=0, rasterized=True)
        _frame(axes, reach)
        if all(not varies(name, simulation) for name in ("theta_E", "x", "y")):
            lens = simulation["lens"]
            axes.add_patch(Circle((lens["x"], lens["y"]), 2 * lens["theta_E"], fill=False, color=GREY, linewidth=0.8))
    panels[0][0].set_ylabel("subhaloes per bin")
    panels[1][0].set_ylabel("y [arcsec]")
    return figure


def _mass_function(subhalos: dict[str, Any], alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Return bins of mass, and the share of the subhaloes that each should hold."""
    low, high = subhalos["mass_min"], subhalos["mass_max"]
    if subhalos["mass_function"] == "decades":
        number = 1 + np.arange(1 + int(math.log10(high / low) + 1e-9))
        return low * 10 ** (np.append(number, number[-1] + 1) - 1.5), number**alpha / (number**alpha).sum()
    edges = np.geomspace(low, high, 25)
    # Exactly; alpha = -1 is outside what the paper draws.
    return edges, np.diff(edges ** (alpha + 1)) / (high ** (alpha + 1) - low ** (alpha + 1))


@styled
def example(illustration: dict[str, Any], simulation: dict[str, Any]) -> Figure:
    """Figure 3: the source, the surface density of the lens, and the image with the subhaloes in it."""
    lens = illustration["example"]
    half = lens["frame"] / 2
    axis = np.linspace(-half, half, 200)
    radius = np.hypot(axis, axis[:, None])
    source = np.exp(-(radius**2) / (2 * lens["source_sigma"] ** 2))
    source[radius > (simulation["source"]["cut"] or math.inf)] = 0
    density = np.log10(np.maximum(lens["convergence"], 1e-3))
    figure = Figure(figsize=(WIDTH, 3.05), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    extent = (-half, half, -half, half)
    shades = {"origin": "lower", "extent": extent, "interpolation": "none"}
    low, high = np.quantile(density, [0.01, 0.998])
    drawn = [
        left.imshow(source, cmap="magma", vmin=0, **shades),
        middle.imshow(density, cmap="cividis", vmin=low, vmax=high, **shades),
        right.imshow(np.array(lens["image"]), cmap="magma", **shades),
    ]
    masses = np.array(lens["mass"])
    area = np.clip(60 * (masses / masses.max()) ** (2 / 3), 1.5, None)
    right.scatter(
        lens["x"], lens["y"], s=area, facecolors="none", edgecolors="white", linewidths=0.4, alpha=0.8, rasterized=True
    )
    titles = ("source", r"surface density, $\log_{10}\kappa$", f"lensed image and {len(masses)} subhaloes")
    for axes, picture, title in zip((left, middle, right), drawn, titles, strict=True):
        _frame(axes, half)
        axes.spines[["top", "right"]].set_visible(True)
        axes.set_title(title)
        figure.colorbar(picture, ax=axes, shrink=0.74, aspect=22, pad=0.02).outline.set_linewidth(0.5)
    left.set_ylabel("y [arcsec]")
    return figure


@styled
def architecture(networks: dict[str, dict[str, Any]]) -> Figure:
    """Figure 4: the layers of both networks, as tall as their images and as wide as their filters."""
    figure = Figure(figsize=(WIDTH, 1.8 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
    for axes, (title, card) in zip(panels, networks.items(), strict=True):
        x = 0.0
        for width, height, above, below, colour in _layers(card):
            axes.add_patch(Rectangle((x, -height / 2), width, height, facecolor=colour, edgecolor="black", alpha=0.6))
            axes.text(x + width / 2, height / 2 + 0.05, above, ha="center", va="bottom")
            axes.text(x + width / 2, -height / 2 - 0.05, below, ha="center", va="top")
            x += width + 0.9
        axes.set(xlim=(-0.5, max(x, 8)), ylim=(-1.1, 0.75))
        axes.set_axis_off()
        axes.set_title(title, loc="left")
    return figure


def _layers(card: dict[str, Any]) -> Iterator[tuple[float, float, str, str, str]]:
    """Yield width, height, what stands above and below, and colour of each layer, from the image on."""
    model, side = card["model"], card["num_pixels"]
    yield 0.06, 1.0, f"{side} × {side}", "image", GREY
    for layer, num_filters in enumerate(model["filters"], 1):
        side //= 2
        below = f"{model['kernel_size']} × {model['kernel_size']}, {model['activation']}\nnormalise, pool"
        yield num_filters / 80, max(0.5**layer, 0.1), f"{side} × {side} × {num_filters}", below, OURS
    yield 0.06, 0.8, f"{num_filters * side * side:,}", "flat", GREY
    yield 0.06, 0.6, f"{model['dense']:,}", f"dense,\n{model['activation']}", PAPER
    if card["network"] == "alpha-cnn":
        yield 0.06, 0.1, "N", "beside", GREY
    yield 0.06, 0.1, TARGETS[card["network"]], "dense", PAPER


@styled
def predictions(entries: list[dict[str, Any]], networks: dict[str, tuple[str, int, _Curves]]) -> Figure:
    """Figures 5 to 8: predicted against true where alpha varies, and the errors at each alpha.

    `networks` has, for each network: its symbol, the digits of its errors, and the paper's measures.
    """
    figure = Figure(figsize=(WIDTH, 3.75 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 2, width_ratios=[1, 1.22], squeeze=False)
    for (scatter, errors), (name, (symbol, digits, paper)) in zip(panels, networks.items(), strict=True):
        varied = [entry for entry in entries if entry["alpha"] is None]
        if varied:
            _scatter(scatter, varied[0], name, symbol, digits, paper.get(None))
        else:
            scatter.set_axis_off()
        _errors(errors, entries, name, symbol, digits, paper)
    return figure


def _scatter(
    axes: Axes, entry: dict[str, Any], name: str, symbol: str, digits: int, paper: dict[str, float | None] | None
) -> None:
    edges = np.array(entry["figures"][name]["scatter"]["edges"])
    counts = np.array(entry["figures"][name]["scatter"]["counts"])  # [true][predicted]
    ours, low, high = entry[name], edges[0], edges[-1]
    axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        origin="lower",
        extent=(low, high, low, high),
        cmap=mpl.colors.LinearSegmentedColormap.from_list("", ["#DDDDDD", "#222222"]),
        norm=PowerNorm(0.6),
        interpolation="none",
    )
    axes.plot([low, high], [low, high], color="black", linestyle="--", linewidth=0.9, label="predicted = true")
    # A straight line fitted by least squares goes through the means.
    mean = (counts.sum(axis=1) * (edges[1:] + edges[:-1]) / 2).sum() / counts.sum()
    x = np.array([low, high])

    def line(gradient: float, **style: Any) -> None:
        axes.plot(x, mean + ours["bias"] + gradient * (x - mean), **style)

    if ours["gradient"] is not None:
        line(ours["gradient"], color=OURS, linewidth=2, label=f"fit, gradient {ours['gradient']:.3f}")
    if paper and paper["gradient"] is not None:
        line(
            paper["gradient"],
            color=PAPER,
            linestyle=":",
            linewidth=2,
            label=f"paper's gradient {paper['gradient']:.3f}",
        )
    axes.set(
        xlim=(low, high), ylim=(low, high), xlabel=f"true ${symbol}$", ylabel=f"predicted ${symbol}$", aspect="equal"
    )
    measured = f"RMSE {ours['rmse']:.{digits}f}" + (f" (paper {printed(paper['rmse'], digits)})" if paper else "")
    box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.5}
    axes.text(
        0.975, 0.035, f"{measured}\nbias {ours['bias']:+.{digits}f}", ha="right", transform=axes.transAxes, bbox=box
    )
    axes.legend(loc="upper left", frameon=True, framealpha=0.85, edgecolor="none", borderpad=0.2)


def _errors(axes: Axes, entries: list[dict[str, Any]], name: str, symbol: str, digits: int, paper: _Curves) -> None:
    held = sorted((entry for entry in entries if entry["alpha"] is not None), key=lambda entry: -entry["alpha"])
    shades = mpl.colormaps["viridis"](np.linspace(0.85, 0.05, max(len(held), 1)))
    curves = [*zip(held, shades, strict=False), *((entry, "black") for entry in entries if entry["alpha"] is None)]
    for entry, colour in curves:
        edges, density = _density(entry["figures"][name]["errors"], entry["num_images"], merge=3)
        label = "varied" if entry["alpha"] is None else rf"$\alpha$ = {entry['alpha']:.1f}".replace("-", "−")
        label += rf":  σ {entry[name]['sigma']:.{digits}f}"
        if entry["alpha"] in paper:
            label += f"  (paper {printed(paper[entry['alpha']]['sigma'], digits)})"
        style: dict[str, Any] = {"linestyle": "--", "linewidth": 1.8} if entry["alpha"] is None else {}
        axes.plot((edges[1:] + edges[:-1]) / 2, density, color=colour, label=label, **style)
    axes.axvline(0, ymax=0.74, color=GREY, linewidth=0.7)
    axes.set(xlabel=f"error of ${symbol}$: predicted − true", ylabel="probability density")
    axes.set_ylim(0, 1.42 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper center", ncols=2, columnspacing=1.2, handlelength=1.4)


@styled
def learning_curves(networks: dict[str, dict[str, Any]]) -> Figure:
    """The losses of both networks, epoch by epoch, of the target as it is scaled."""
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    for axes, (title, card) in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks.items(), strict=True):
        epochs = [record["epoch"] for record in card["history"]]
        marker = "o" if len(epochs) < 30 else ""
        for key, label, colour, style in (
            ("train_loss", "training (with dropout)", PAPER, "--"),
            ("validation_loss", "validation", OURS, "-"),
        ):
            losses = [record[key] for record in card["history"]]
            axes.plot(epochs, losses, color=colour, linestyle=style, marker=marker, markersize=3.5, label=label)
        axes.axvline(card["epoch"], color=GREY, linewidth=0.8, linestyle=":", label=f"kept: epoch {card['epoch']}")
        axes.set(yscale="log", xlabel="epoch", title=title, xlim=(min(epochs) - 0.5, max(epochs) + 0.5))
        training = card["training"]
        axes.set_ylabel(f"{LOSSES[training['loss']]} error,\n{TARGETS[card['network']]} {training['labels']}")
        axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(axis="y", which="both", color="#EEEEEE", linewidth=0.6)
        axes.legend()
    return figure


def printed(value: float | None, digits: int) -> str:
    """Return a number of the paper as the paper prints it: of three digits, and so 49.0 but 155."""
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _frame(axes: Axes, half: float) -> None:
    axes.set(xlim=(-half, half), ylim=(-half, half), aspect="equal", xlabel="x [arcsec]")


def _density(histogram: dict[str, Any], num_images: int, merge: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges and the densities of a histogram, with `merge` bins made one."""
    counts, edges = np.array(histogram["counts"]), np.array(histogram["edges"])
    starts = np.arange(0, len(counts), merge)
    edges = edges[[*starts, len(counts)]]
    return edges, np.add.reduceat(counts, starts) / (num_images * np.diff(edges))
