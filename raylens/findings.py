"""What a campaign found, as one HTML page: its best trials, and what each hyper-parameter does.

All is drawn from the record of the campaign (`campaign`). Trials that were stopped had fewer epochs than those that
completed, so hyper-parameters are compared after the epochs that every trial was given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from statistics import quantiles

import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from raylens import figures, page
from raylens.campaign import Campaign, Tried
from raylens.search import Configuration, Space, searched, spelled_out

_NUM_SHOWN = 20  # trials of the leaderboard that are seen at once
_NUM_CURVES = 5  # that have a colour
_LEAST_TRIALS = 8  # that an importance is estimated from
_STATUSES = {"completed": "completed", "stopped": "stopped early", "failed": "failed", "running": "not ended"}
_METRICS = {"validation_rmse": "RMSE", "validation_loss": "loss"}


def findings(record: Campaign) -> str:
    """Return one self-contained HTML page on a campaign, as far as it has come."""
    importances = _importances(record)
    sections = {
        "In short": _in_short(record, importances),
        "The best trials": _leaderboard(record),
        "Every trial": _parallel_coordinates(record),
        "What each hyper-parameter does": _effects(record, importances),
        "Learning curves": _learning_curves(record),
        "Cost": _cost(record),
        "What failed": _failed(record),
        "The space": _space(record),
        "Provenance": _provenance(record),
    }
    parts = {title: "\n".join(lines) for title, lines in sections.items()}
    return page.fill(
        "findings.html",
        title=f"Search {page.text(record.search.name)}",
        main="\n".join(f"<h3>{title}</h3>\n{part}" for title, part in parts.items() if part),
    )


def _metric_name(record: Campaign) -> str:
    symbol = {"n-cnn": "N", "alpha-cnn": "α"}[record.search.network]
    return f"{_METRICS[record.search.metric]} of {symbol}"


def _digits(record: Campaign) -> int:
    return 1 if (record.search.network, record.search.metric) == ("n-cnn", "validation_rmse") else 4


def _comparable(record: Campaign) -> list[tuple[Tried, float]]:
    """Return the trials that had the least number of epochs, with their metric at that time, the best first."""
    least = record.search.epochs[0]
    values = [(trial, min(trial.values[:least])) for trial in record.trials if len(trial.values) >= least]
    return sorted(values, key=lambda pair: pair[1])


def _described(record: Campaign, config: Configuration) -> str:
    settings = spelled_out(record.search, config).items()
    return ", ".join(f"{page.text(name.replace('_', ' '))} {page.setting(value)}" for name, value in settings)


def _in_short(record: Campaign, importances: dict[str, float]) -> Iterator[str]:
    metric, digits, best = _metric_name(record), _digits(record), record.best
    counted = [(status, sum(trial.status == status for trial in record.trials)) for status in _STATUSES]
    told = ", ".join(f"{number:,} {_STATUSES[status]}" for status, number in counted if number)
    yield (
        f"<p>{page.count(len(record.trials), 'trial')} of {record.num_possible:,} possible: {told}. "
        f"{record.num_training_images:,} images of {record.num_pixels} × {record.num_pixels} pixels trained them, "
        f"{record.num_validation_images:,} others ranked them by {metric}.</p>"
    )
    if best is None:
        yield "<p>None has come to the end of an epoch.</p>"
        return
    yield (
        f"<p>The best: {_described(record, best.config)}, with {metric} {page.number(best.metric, digits)} "
        f"after epoch {best.epoch} of {best.epochs}.</p>"
    )
    yield f"<p>{_of_reference(record, best)}</p>"
    if importances:
        first = ", ".join(f"{name.replace('_', ' ')} ({share:.0%})" for name, share in list(importances.items())[:3])
        yield f"<p>What matters most: {first}, of how the {metric} varies after {_epochs(record)}.</p>"


def _of_reference(record: Campaign, best: Tried) -> str:
    whose = f"the recipe {page.text(record.search.recipe)}"
    if record.reference is None:
        return f"The settings of {whose} are not in this space."
    rank = record.reference_rank()
    if rank is None:
        return f"The settings of {whose} were not tried."
    trial, digits = record.ranked()[rank - 1], _digits(record)
    assert trial.metric is not None
    assert best.metric is not None
    early = [one.id for one, _ in _comparable(record)]
    after = f", and {early.index(trial.id) + 1} of {len(early)} after {_epochs(record)}" if trial.id in early else ""
    return (
        f"The settings of {whose} rank {rank} of {len(record.ranked())}{after}: {_described(record, trial.config)}, "
        f"with {page.number(trial.metric, digits)} after epoch {trial.epoch} of {trial.epochs}, "
        f"{page.plain(trial.metric / best.metric, 2)} × the best."
    )


def _epochs(record: Campaign) -> str:
    return page.count(record.search.epochs[0], "epoch")


def _leaderboard(record: Campaign) -> Iterator[str]:
    ranked, names, digits = record.ranked(), list(record.search.values), _digits(record)
    heads = "".join(f'<th scope="col">{page.text(name.replace("_", " "))}</th>' for name in names)
    head = (
        f'<thead><tr><th scope="col">rank</th><th scope="col">trial</th>{heads}<th scope="col">epochs</th>'
        f'<th scope="col">best epoch</th><th scope="col">{_metric_name(record)}</th>'
        '<th scope="col">time</th></tr></thead>'
    )
    rows = []
    for rank, trial in enumerate(ranked, start=1):
        settings = "".join(f"<td>{page.setting(trial.config[name])}</td>" for name in names)
        whose = " (recipe)" if trial.config == record.reference else ""
        kind = ' class="reference"' if whose else ""
        rows.append(
            f"<tr{kind}><td>{rank}</td><td>{page.text(trial.id)}{whose}</td>{settings}<td>{trial.epochs}</td>"
            f"<td>{trial.epoch}</td>{page.cell(trial.metric, digits, 'ours')}"
            f'<td class="time">{page.duration(trial.seconds)}</td></tr>'
        )
    shown, rest = rows[:_NUM_SHOWN], rows[_NUM_SHOWN:]
    if shown:
        caption = f"<caption>{_metric_name(record)} on the validation images, in the best epoch</caption>"
        yield f"<table>{caption}{head}<tbody>{''.join(shown)}</tbody></table>"
    if rest:
        table = f"<table>{head}<tbody>{''.join(rest)}</tbody></table>"
        yield f"<details><summary>and {page.count(len(rest), 'other')}</summary>{table}</details>"


def _parallel_coordinates(record: Campaign) -> Iterator[str]:
    if len(record.ranked()) < 2 or not searched(record.search):
        return
    yield page.drawing(
        parallel_coordinates(record),
        "Parallel coordinates",
        f"A line for each trial, through the values it tried to its {_metric_name(record)} in the end, the lowest "
        "on top; the darker, the better. Orange, dashed: the recipe’s own settings.",
        "A line for each trial through its settings; the table above has those of the best.",
    )


def _effects(record: Campaign, importances: dict[str, float]) -> Iterator[str]:
    comparable, digits, metric = _comparable(record), _digits(record), _metric_name(record)
    if not comparable or not searched(record.search):
        return
    yield page.drawing(
        marginal_effects(record),
        "Marginal effects",
        f"The {metric} of each trial after {_epochs(record)}, by the value of one hyper-parameter, whatever the "
        "others; bars span the central half of the trials, and the line is their median.",
        f"{metric} by value of each hyper-parameter, as in the table below.",
    )
    rows = []
    for name in searched(record.search):
        for place, value in enumerate(record.search.values[name]):
            values = [metric for trial, metric in comparable if trial.config[name] == value]
            low, middle, high = _quartiles(values)
            title = page.text(name.replace("_", " ")) if place == 0 else ""
            share = importances.get(name) if place == 0 else None
            told = f"<td>{page.number(100 * share, 0)} %</td>" if share is not None else "<td></td>"
            rows.append(
                f'<tr><th scope="row">{title}</th>{told}'
                f"<td>{page.setting(value)}</td><td>{len(values)}</td>{page.cell(middle, digits, 'ours')}"
                f"{page.cell(low, digits)}{page.cell(high, digits)}{page.cell(min(values, default=None), digits)}</tr>"
            )
    yield (
        f"<table><caption>{metric} after {_epochs(record)}</caption>"
        '<thead><tr><th scope="col" class="left">hyper-parameter</th><th scope="col">importance</th>'
        '<th scope="col">value</th><th scope="col">trials</th><th scope="col">median</th>'
        '<th scope="col">lower quartile</th><th scope="col">upper quartile</th><th scope="col">best</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    about = (
        f"Importance: the share of the variance of the logarithm of the {metric} that a hyper-parameter alone explains "
        "in a forest of regression trees (functional ANOVA, by Optuna), all shares made one together."
        if importances
        else f"Importances are estimated from {_LEAST_TRIALS} trials on."
    )
    changed = " Of a population the settings are those that a trial ended with." if record.searcher == "pbt" else ""
    yield f'<p class="quiet">{about}{changed}</p>'


def _quartiles(values: list[float]) -> tuple[float | None, float | None, float | None]:
    match values:
        case []:
            return None, None, None
        case [value]:
            return value, value, value
    low, middle, high = quantiles(values, method="inclusive")
    return low, middle, high


def _importances(record: Campaign) -> dict[str, float]:
    """Return the share of each hyper-parameter in how the metric varies, the largest first; none of too few trials."""
    comparable = _comparable(record)
    if len(comparable) < _LEAST_TRIALS or not searched(record.search):
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space, study = Space(record.search), optuna.create_study()
    for trial, metric in comparable:
        study.add_trial(
            optuna.trial.create_trial(
                params=space.params(trial.config), distributions=space.distributions, value=math.log(metric)
            )
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=record.search.seed)
    told = optuna.importance.get_param_importances(study, evaluator=evaluator, params=searched(record.search))
    return {name: float(share) for name, share in told.items()}


def _learning_curves(record: Campaign) -> Iterator[str]:
    if not any(len(trial.values) > 1 for trial in record.trials):
        return
    yield page.drawing(
        learning_curves(record),
        "Learning curves",
        f"{_metric_name(record)} of each trial, epoch by epoch; in colour the best, dashed the recipe’s own settings.",
        "Falling curves, one for each trial; most end early.",
    )


def _cost(record: Campaign) -> Iterator[str]:
    rows = "".join(
        f'<tr><th scope="row">{title}</th><td>{len(trials):,}</td><td>{sum(trial.epochs for trial in trials):,}</td>'
        f"<td>{page.duration(sum(trial.seconds for trial in trials))}</td></tr>"
        for status, title in _STATUSES.items()
        if (trials := [trial for trial in record.trials if trial.status == status])
    )
    gpus = f", {page.number(record.gpu_seconds / 3600, 2)} GPU-hours" if record.gpu_seconds else ""
    yield (
        '<table><thead><tr><th scope="col" class="left">Trials</th><th scope="col">number</th>'
        '<th scope="col">epochs</th><th scope="col">time in them</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        f"<p>{page.duration(record.seconds)}, {page.number(record.cpu_seconds / 3600, 2)} CPU-hours{gpus}; "
        f"{page.count(record.num_slots, 'trial')} at once, and {page.number(100 * record.busy, 0)} % of the time "
        "of their places was spent in trials.</p>"
    )


def _failed(record: Campaign) -> Iterator[str]:
    rows = "".join(
        f"<tr><td>{page.text(trial.id)}</td><td>{_described(record, trial.config)}</td>"
        f"<td>{page.text(trial.reason)}</td></tr>"
        for trial in record.trials
        if trial.status == "failed"
    )
    if rows:
        heads = '<th scope="col">trial</th><th scope="col">settings</th><th scope="col">reason</th>'
        yield f'<table class="text"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _space(record: Campaign) -> Iterator[str]:
    rows = "".join(
        f'<tr><th scope="row">{page.text(name.replace("_", " "))}</th><td>{page.setting(values)}</td></tr>'
        for name, values in record.search.values.items()
    )
    yield f'<table class="text"><tbody>{rows}</tbody></table>'
    least, most = record.search.epochs
    left_out = "".join(f" {number:,} are left out: {page.text(why)}." for why, number in record.left_out.items())
    yield (
        f"<p>{page.count(record.num_possible, 'configuration')}, each trained for {least} to {most} epochs; "
        f"what is not searched is as in the recipe {page.text(record.search.recipe)}.{left_out} "
        f"Searcher: {page.text(record.searcher)}, seed {record.search.seed}.</p>"
    )


def _provenance(record: Campaign) -> Iterator[str]:
    versions = ", ".join(f"{page.text(name)} {page.text(version)}" for name, version in record.versions.items())
    validation = (
        f"<code>{page.text(record.validation_dataset)}</code>" if record.validation_dataset else "a tenth of it"
    )
    yield (
        f"<p>Dataset <code>{page.text(record.dataset)}</code>, validated on {validation}. {versions}.</p>"
        "<details><summary>The space as JSON</summary>"
        f"<pre>{page.text(json.dumps(record.search.as_dict(), indent=2))}</pre></details>"
    )


@figures.styled
def parallel_coordinates(record: Campaign) -> Figure:
    """A line for each trial, through its values and to its metric."""
    ranked, names = record.ranked(), searched(record.search)
    figure = Figure(figsize=(figures.WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    metrics = np.log([trial.metric for trial in ranked])  # type: ignore[arg-type]
    reach = (metrics.max() - metrics.min()) or 1.0
    places = {name: _places(record.search.values[name]) for name in names}
    shades = colormaps["viridis"](np.linspace(0.0, 0.92, len(ranked)))
    for rank in reversed(range(len(ranked))):
        config = ranked[rank].config
        # Those that tried the same are drawn beside each other.
        beside = 0.06 * (rank / max(len(ranked) - 1, 1) - 0.5)
        heights = [places[name][config[name]] - beside for name in names]
        line = [*heights, 1 - (metrics[rank] - metrics.min()) / reach]
        if config == record.reference:
            axes.plot(line, color=figures.PAPER, linestyle="--", linewidth=2.2, zorder=len(ranked) + 1)
        else:
            width = 1.8 if rank < _NUM_CURVES else 0.7
            axes.plot(line, color=shades[rank], linewidth=width, zorder=len(ranked) - rank)
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
    for column, name in enumerate(names):
        axes.axvline(column, color="black", linewidth=0.7)
        for value, height in places[name].items():
            axes.text(column + 0.03, height, _tick(value), va="center", zorder=1000, bbox=box, fontsize=7.5)
    axes.axvline(len(names), color="black", linewidth=0.7)
    for place in (0, len(ranked) // 2, len(ranked) - 1):
        height = 1 - (metrics[place] - metrics.min()) / reach
        told = f"{ranked[place].metric:.4g}"
        axes.text(len(names) + 0.03, height, told, va="center", zorder=1000, bbox=box, fontsize=7.5)
    titles = [*(name.replace("_", " ") for name in names), _metric_name(record)]
    axes.set_xticks(range(len(titles)), titles)
    axes.set(yticks=[], xlim=(-0.1, len(names) + 0.35), ylim=(-0.08, 1.08))
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _places(values: Sequence[int | float | str]) -> dict[int | float | str, float]:
    """Return where each value stands on an axis from 0 to 1: numbers grow upwards."""
    ordered = values if any(isinstance(value, str) for value in values) else sorted(values)
    return {value: place / max(len(ordered) - 1, 1) for place, value in enumerate(ordered)}


def _tick(value: int | float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


@figures.styled
def marginal_effects(record: Campaign) -> Figure:
    """The metric after the epochs that every trial was given, by value of each hyper-parameter."""
    comparable, names = _comparable(record), searched(record.search)
    num_columns = min(len(names), 4)
    num_rows = math.ceil(len(names) / num_columns)
    figure = Figure(figsize=(figures.WIDTH * num_columns / 4, 2.3 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)
    for axes in panels.flat[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(panels.flat, names, strict=False):
        ordered = list(_places(record.search.values[name]))
        for place, value in enumerate(ordered):
            values = [metric for trial, metric in comparable if trial.config[name] == value]
            beside = 0.18 * np.linspace(-1, 1, len(values)) * (len(values) > 1)
            low, middle, high = _quartiles(values)
            if low is not None and middle is not None and high is not None:
                axes.plot(place + beside, values, "o", color=figures.GREY, markersize=2, alpha=0.6)
                axes.fill_between([place - 0.3, place + 0.3], low, high, color=figures.OURS, alpha=0.25, linewidth=0)
                axes.plot([place - 0.3, place + 0.3], [middle, middle], color=figures.OURS, linewidth=2)
        axes.set_xticks(range(len(ordered)), [_tick(value) for value in ordered])
        axes.set(xlabel=name.replace("_", " "), xlim=(-0.6, len(ordered) - 0.4))
        _log_scale(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel(_metric_name(record))
    return figure


@figures.styled
def learning_curves(record: Campaign) -> Figure:
    """The metric of each trial, epoch by epoch."""
    figure = Figure(figsize=(figures.WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    ranked = [trial for trial in record.ranked() if trial.values]
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, _NUM_CURVES))
    for rank in reversed(range(len(ranked))):
        trial = ranked[rank]
        epochs = range(1, len(trial.values) + 1)
        marker = "o" if len(trial.values) < 30 else ""
        if trial.config == record.reference:
            label = f"recipe: {trial.metric:.4g}"
            axes.plot(epochs, trial.values, color=figures.PAPER, linestyle="--", linewidth=2, label=label, zorder=1000)
        elif rank < _NUM_CURVES:
            label = f"trial {trial.id}: {trial.metric:.4g}"
            style = {"color": shades[rank], "marker": marker, "markersize": 3}
            axes.plot(epochs, trial.values, label=label, zorder=900 - rank, **style)
        else:
            axes.plot(epochs, trial.values, color="#BBBBBB", marker=marker, markersize=1.5, linewidth=0.7)
    axes.set(xlabel="epoch", ylabel=_metric_name(record))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    _log_scale(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1])
    return figure


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(axis="y", which="both", color="#EEEEEE", linewidth=0.6)
