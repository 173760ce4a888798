"""results.json to one HTML page: our numbers beside the paper's, and beside what needs no image.

The frame of the page, and what it says whatever the results, is `report.html`. Every measure stands in a
`<data>` element (`page`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raylens import figures, page, paper

_MEASURES = {"gradient": "Gradient", "sigma": "σ", "rmse": "RMSE"}  # what the paper has; we add the bias


@dataclass(frozen=True)
class _Network:
    """How the numbers of one network are told."""

    title: str
    symbol: str
    digits: int  # of sigma, RMSE and bias
    baselines: dict[str, str]  # name in results.json: name on the page


_WITHOUT_IMAGE = {
    "alpha_constant": "constant",
    "alpha_from_true_n": "true N",
    "alpha_from_true_n_and_mass": "N with mass",
    "alpha_from_ring": "ring",
}
_NETWORKS = {
    "n_cnn": _Network("N‑CNN: the number of subhaloes N", "N", 1, {"n_constant": "constant", "n_from_ring": "ring"}),
    "alpha_cnn": _Network("α‑CNN, given the predicted N: the slope α", "α", 3, _WITHOUT_IMAGE),
    "alpha_cnn_true_n": _Network("α‑CNN, given the true N: the slope α", "α", 3, _WITHOUT_IMAGE),
}

# What stands at the top: a network, a measure of it, its digits.
_HEADLINE = (("n_cnn", "gradient", 3), ("n_cnn", "rmse", 1), ("alpha_cnn", "gradient", 3), ("alpha_cnn", "rmse", 3))

# What a results.json has, and each of its datasets; a full stop goes one level down.
_NEEDED = ("recipe", "simulation.camera.num_pixels", "digest", "n_cnn.history", "alpha_cnn.history", "versions")
_NEEDED_OF_A_SET = (
    *("split", "alpha", "n_cnn.relative_rmse", "alpha_cnn.relative_rmse", "figures.n_cnn", "truth"),
    *("baselines.n_from_ring", "baselines.alpha_from_ring"),
)


def report(results: list[dict[str, Any]]) -> str:
    """Return one self-contained HTML page on some results, each as `raylens evaluate` makes them.

    What `raylens reproduce` adds to them, stages and machine, is told where it is there.

    Raises
    ------
    ValueError
        If one of them is anything else.
    """
    for one in results:
        _require_results(one)
    return page.fill(
        "report.html",
        title=page.text(", ".join(one["recipe"] for one in results)),
        overview=_overview(results) if len(results) > 1 else "",
        experiments="\n".join(_experiment(number, one) for number, one in enumerate(results, 1)),
    )


def _require_results(results: Any) -> None:
    def require(values: Any, names: tuple[str, ...]) -> None:
        for name in names:
            place = values
            for key in name.split("."):
                if not isinstance(place, dict) or key not in place:
                    raise ValueError(f"this is not a results.json of `raylens evaluate`: it lacks {name}.")
                place = place[key]

    require(results, (*_NEEDED, "datasets"))
    if not (isinstance(results["datasets"], list) and results["datasets"]):
        raise ValueError("this is not a results.json of `raylens evaluate`: its datasets are no list, or none.")
    for entry in results["datasets"]:
        require(entry, _NEEDED_OF_A_SET)


def _overview(results: list[dict[str, Any]]) -> str:
    """Return a table with a row for each experiment; one alone has its headline."""
    rows = []
    for number, one in enumerate(results, 1):
        tables, entry = paper.tables(one["simulation"]), _main_set(one)
        cells = "".join(
            page.cell(entry[name][measure], digits, "ours first")
            + _paper_cell(_of_paper(tables.get(name), one, entry, measure), digits)
            for name, measure, digits in _HEADLINE
        )
        rows.append(
            f'<tr><th scope="row"><a href="#experiment-{number}">{page.text(one["recipe"])}</a></th>{cells}</tr>'
        )
    heads = "".join(f'<th colspan="2" scope="colgroup" class="first">{_heading(*item)}</th>' for item in _HEADLINE)
    below = '<th scope="col" class="ours first">ours</th><th scope="col">paper</th>' * len(_HEADLINE)
    return (
        '<nav><table class="measures"><caption>At a glance, where α varies</caption>'
        f'<thead><tr><th scope="col" rowspan="2" class="left">Experiment</th>{heads}</tr>'
        f'<tr class="sub">{below}</tr></thead><tbody>{"".join(rows)}</tbody></table></nav>'
    )


def _experiment(number: int, results: dict[str, Any]) -> str:
    tables = paper.tables(results["simulation"])
    return "\n".join(
        [
            f'<section class="experiment" id="experiment-{number}">',
            f"<h2>{page.text(results['recipe'])}</h2>",
            _what_was_done(results),
            _headline(results, tables),
            _in_short(results, tables),
            *_cautions(results, tables),
            "<h3>Results</h3>",
            *(
                _measures(results, name, tables.get(name)) + _worse(results, name, tables.get(name))
                for name in _NETWORKS
                if name in _main_set(results)
            ),
            '<p class="quiet">Ratio: ours over the paper’s. RMSE / sd: over the standard deviation of the true values, '
            "which differs between populations; Bias: the mean of predicted − true; neither is in the paper. "
            "Where α is held, the constant is right by chance near α = −2: compare with it in the row Varied. "
            'See the <a href="#notes">notes</a> on the paper’s numbers.</p>',
            *_prediction_figures(results, tables),
            "<h3>The lenses</h3>",
            *_lens_figures(results),
            "<h3>Training</h3>",
            *_training(results),
            "<h3>Cost</h3>",
            _cost(results),
            "<h3>Provenance</h3>",
            _provenance(results),
            "</section>",
        ]
    )


def _main_set(results: dict[str, Any]) -> dict[str, Any]:
    """Return the first test set with alpha varied, or the first of all."""
    return next((entry for entry in results["datasets"] if entry["alpha"] is None), results["datasets"][0])


def _of_paper(table: paper.Table | None, results: dict[str, Any], entry: dict[str, Any], measure: str) -> float | None:
    """Return the paper's number for a test set; a set of another simulation than the first has none."""
    if table is None or entry["digest"] != results["digest"]:
        return None
    return table.measures.get(entry["alpha"], {}).get(measure)


def _what_was_done(results: dict[str, Any]) -> str:
    camera, entry = results["simulation"]["camera"], _main_set(results)
    cards = {"N‑CNN": results["n_cnn"], "α‑CNN": results["alpha_cnn"]}
    num_training = " and ".join(f"{number:,}" for number in {card["num_training_images"]: 0 for card in cards.values()})
    epochs = " and ".join(
        f"the {title} for {page.count(len(card['history']), 'epoch')}" for title, card in cards.items()
    )
    num_tested = sum(each["num_images"] for each in results["datasets"])
    return (
        f"<p>Simulated lenses of {camera['num_pixels']:d} × {camera['num_pixels']:d} pixels "
        f"at {camera['pixel_scale']:g} arcsec: {num_training} images trained {epochs}, "
        f"{results['n_cnn']['num_validation_images']:,} chose the epoch to keep, and {num_tested:,} new ones "
        f"tested both networks in {page.count(len(results['datasets']), 'set')}. "
        f"Below, the results on {page.text(entry['split'])} ({entry['num_images']:,} images).</p>"
    )


def _headline(results: dict[str, Any], tables: dict[str, paper.Table]) -> str:
    entry, cards = _main_set(results), []
    for name, measure, digits in _HEADLINE:
        theirs = _of_paper(tables.get(name), results, entry, measure)
        compared = [("ours", entry[name][measure])] + ([("paper", theirs)] if theirs is not None else [])
        compared += [(title, entry["baselines"][key][measure]) for key, title in _NETWORKS[name].baselines.items()]
        longest = max(value or 0 for _, value in compared) or 1
        rows = "".join(
            f'<tr><th scope="row">{title}</th><td class="bar" aria-hidden="true"><span class="{title.split()[0]}" '
            f'style="width:{max(0, 100 * (value or 0) / longest):.1f}%"></span></td>'
            f"{_paper_cell(value, digits) if title == 'paper' else page.cell(value, digits)}</tr>"
            for title, value in compared
        )
        cards.append(
            f'<div class="card"><h3>{_heading(name, measure, digits)}</h3>'
            f'<p class="value">{page.number(entry[name][measure], digits)}</p>'
            f"<table><tbody>{rows}</tbody></table></div>"
        )
    return f'<div class="headline">{"".join(cards)}</div>'


def _heading(name: str, measure: str, digits: int) -> str:
    return f"{_MEASURES[measure]} of {_NETWORKS[name].symbol}"


def _in_short(results: dict[str, Any], tables: dict[str, paper.Table]) -> str:
    """Return how our errors compare, and what the baselines are."""
    entry = _main_set(results)
    short, best = [], []
    for name, constant in (("n_cnn", "n_constant"), ("alpha_cnn", "alpha_constant")):
        ours, network = entry[name]["rmse"], _NETWORKS[name]
        others = {"the paper’s": _of_paper(tables.get(name), results, entry, "rmse")}
        others |= {title: entry["baselines"][key]["rmse"] for key, title in network.baselines.items()}
        ratios = ", ".join(f"{page.number(ours / value, 2)} × {other}" for other, value in others.items() if value)
        short.append(f"Our RMSE of {network.symbol} is {ratios}.")
        variance = entry["baselines"][constant]["rmse"] ** 2 - entry["baselines"][constant]["bias"] ** 2
        if entry[name]["gradient"] is not None and variance > 0:
            best.append(f"{page.number(1 - ours**2 / variance, 3)} for {network.symbol}")
    return (
        f"<p>{' '.join(short)}</p>"
        '<ul class="quiet"><li>No image is seen by the <b>constant</b>, the mean of the training labels, and by what '
        "is fitted to training labels given the truth: the <b>true N</b>; this N <b>with the mass</b> of the lens; "
        "and the <b>ring</b>: the θ<sub>E</sub> of the lens and the sum of the subhaloes’, as two numbers.</li>"
        "<li>The best possible prediction has gradient 1 − RMSE² / variance, so a gradient of 1 is not the goal; "
        f"with our RMSE it would be {' and '.join(best)}. Rank by RMSE, and look at the bias.</li></ul>"
    )


def _cautions(results: dict[str, Any], tables: dict[str, paper.Table]) -> Iterator[str]:
    """Yield what keeps these results from being held against the paper's as they stand."""
    trained_on = {str(results[name].get("dataset_digest")) for name in ("n_cnn", "alpha_cnn")} - {results["digest"]}
    if trained_on:
        yield (
            f'<p class="caution">The networks were trained on another simulation ({page.text(", ".join(trained_on))}) '
            f"than the one they are tested on ({page.text(results['digest'])}).</p>"
        )
    if not tables:
        yield (
            '<p class="caution">No table of the paper has this geometry and these pixels (it has fixed geometry with '
            "60 pixels of 0.1 arcsec or 30 of 0.2 arcsec, and varied geometry with 60 of 0.1 arcsec), "
            "so our numbers stand alone.</p>"
        )
        return
    table = tables["n_cnn"]
    told: dict[str, str] = {}
    for key, (here, there) in paper.differences(results, table.experiment).items():
        # What both networks share is said once.
        key = key.removeprefix("n_cnn.").removeprefix("alpha_cnn.").removeprefix("simulation.")
        told.setdefault(f"<code>{page.text(key)}</code> {page.setting(here)} (paper {page.setting(there)})", "")
    if told:
        yield f'<p class="caution">Different from the paper’s {table.title.lower()}: {"; ".join(told)}.</p>'


def _measures(results: dict[str, Any], name: str, table: paper.Table | None) -> str:
    """Return the table of one network: a row for each test set, the varied one last, as in the paper."""
    network = _NETWORKS[name]
    of = ("ours", "paper", "ratio") if table else ("ours",)
    groups = [
        *((title, len(of)) for title in _MEASURES.values()),
        ("RMSE / sd", 1),
        ("Bias", 1),
        ("RMSE, no image", len(network.baselines)),
    ]
    heads = "".join(f'<th colspan="{span}" scope="colgroup" class="first">{title}</th>' for title, span in groups)
    columns = [*of * len(_MEASURES), "ours", "ours", *network.baselines.values()]
    classes = {"ours": ' class="ours first"', "constant": ' class="first"'}
    below = "".join(f'<th scope="col"{classes.get(title, "")}>{title}</th>' for title in columns)
    rows = []
    for entry in _as_in_the_paper(results["datasets"]):
        cells = ""
        for measure in _MEASURES:
            digits = 3 if measure == "gradient" else network.digits
            ours, theirs = entry[name][measure], _of_paper(table, results, entry, measure)
            cells += page.cell(ours, digits, "ours first")
            if table:
                ratio = ours / theirs if theirs and ours is not None else None
                cells += _paper_cell(theirs, digits) + page.cell(ratio, 2)
        cells += page.cell(entry[name]["relative_rmse"], 3, "ours first")
        cells += page.cell(entry[name]["bias"], network.digits, "ours first", signed=True)
        for place, key in enumerate(network.baselines):
            cells += page.cell(entry["baselines"][key]["rmse"], network.digits, "" if place else "first")
        alpha = _row_title(entry)
        if entry["digest"] != results["digest"]:
            alpha += f" (simulation {page.text(entry['digest'])})"
        kind = ' class="varied"' if entry["alpha"] is None else ""
        rows.append(f'<tr{kind}><th scope="row">{alpha}</th><td>{entry["num_images"]:,}</td>{cells}</tr>')
    beside = f"beside the paper’s {table.title.lower()}" if table else "the paper has no such table"
    return (
        f'<table class="measures"><caption>{network.title} <span class="quiet">({beside})</span></caption>'
        '<thead><tr><th scope="col" rowspan="2" class="left">α</th><th scope="col" rowspan="2">Images</th>'
        f'{heads}</tr><tr class="sub">{below}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _worse(results: dict[str, Any], name: str, table: paper.Table | None) -> str:
    """Return in which rows our errors are larger than the paper's."""
    if table is None:
        return ""
    told = []
    for measure in ("sigma", "rmse"):
        rows = []
        for entry in _as_in_the_paper(results["datasets"]):
            ours, theirs = entry[name][measure], _of_paper(table, results, entry, measure)
            if theirs and ours > theirs:
                rows.append(f"{_row_title(entry)} ({page.number(ours / theirs, 2)})")
        if rows:
            told.append(f"{_MEASURES[measure]} at α = {', '.join(rows)}".replace("α = Varied", "α varied"))
    return (
        f"<p>Errors larger than in the paper’s {table.title.lower()}, with the ratio: {'; '.join(told) or 'none'}.</p>"
    )


def _as_in_the_paper(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return test sets in the order of the paper's rows: the steeper the later, and the varied one last."""
    return sorted(entries, key=lambda entry: (entry["alpha"] is None, -(entry["alpha"] or 0)))


def _row_title(entry: dict[str, Any]) -> str:
    return "Varied" if entry["alpha"] is None else page.plain(entry["alpha"], 1)


def _prediction_figures(results: dict[str, Any], tables: dict[str, paper.Table]) -> Iterator[str]:
    entries = results["datasets"]
    for names, like, what in (
        (("n_cnn", "alpha_cnn"), 5, "Predictions of N (top) and α (bottom)."),
        (("alpha_cnn_true_n",), 8, "Predictions of α from the image and the true N."),
    ):
        if not all(name in entry for name in names for entry in entries):
            continue
        table = tables.get(names[0])
        networks = {
            name: (_NETWORKS[name].symbol, _NETWORKS[name].digits, tables[name].measures if name in tables else {})
            for name in names
        }
        caption = (
            f"{what} Left: density of predicted against true values where α varies, and the line fitted to them. "
            "Right: errors at each held α, and where it varies (dashed)."
        )
        if table:
            caption += (
                " The dotted line has the paper’s gradient and passes through our mean; the paper has no intercept."
            )
        alt = f"{what} " + "; ".join(
            f"{_NETWORKS[name].symbol}: gradient {page.plain(_main_set(results)[name]['gradient'], 3)}, "
            f"RMSE {page.plain(_main_set(results)[name]['rmse'], _NETWORKS[name].digits)}"
            for name in names
        )
        title = table.figure if table else f"As figure {like}, for these images"
        yield page.drawing(figures.predictions(entries, networks), title, caption, alt)


def _lens_figures(results: dict[str, Any]) -> Iterator[str]:
    simulation, entry, illustration = results["simulation"], _main_set(results), results.get("illustration")
    lens, source = simulation["lens"], simulation["source"]
    caption = f"What varies from lens to lens in {page.text(entry['split'])}."
    if paper.geometry(simulation) == "fixed":
        caption += (
            f" The geometry is fixed: θ<sub>E</sub> = {lens['theta_E']:g} arcsec, q = {lens['q']:g}, "
            f"φ = {lens['phi']:g}, (x, y) = ({lens['x']:g}, {lens['y']:g}) arcsec, source redshift {source['z']:g}."
        )
    alt = "Histograms of what varies from lens to lens."
    yield page.drawing(figures.distributions(entry["truth"], simulation), "Figure 1", caption, alt)
    if illustration is None:
        yield "<p>The test set holds no illustration.json, so figures 2 and 3 are not drawn.</p>"
        return
    slopes = ", ".join(page.plain(slope, 1) for slope in figures.slopes(illustration))
    caption = (
        f"Subhaloes of one lens at α = {slopes}. Top: their masses, and (dashed) those expected of as many. "
        "Bottom: where they lie; the area of a dot grows with the subhalo’s Einstein radius"
    )
    caption += ", and the circle has radius 2 θ<sub>E</sub>." if paper.geometry(simulation) == "fixed" else "."
    alt = "Mass histograms and positions of subhaloes; the steeper the slope, the more and the lighter they are."
    if slopes:
        yield page.drawing(figures.populations(illustration, simulation), "Figure 2", caption, alt)
    else:
        yield "<p>At the slopes of figure 2 a lens would hold too many subhaloes, so it is not drawn.</p>"
    example = illustration["example"]
    caption = (
        "One simulated lens. Left: the source in its own plane. Middle: surface density of lens and subhaloes "
        "in critical units. Right: the image that the networks see, and the subhaloes in front of it. "
        f"α = {page.plain(example['alpha'], 2)}, θ<sub>E</sub> = {example['theta_E']:.2f} arcsec, "
        f"q = {example['q']:.2f}, φ = {example['phi']:.2f}, source redshift {example['z_source']:.2f}."
    )
    if simulation["subhalos"]["compensation"] == "none":
        caption += " The subhaloes add to the main lens, so that the ring lies outside θ<sub>E</sub>."
    alt = f"Source, surface density and lensed image with {len(example['x'])} subhaloes."
    yield page.drawing(figures.example(illustration, simulation), "Figure 3", caption, alt)


def _training(results: dict[str, Any]) -> Iterator[str]:
    cards = {"N‑CNN": results["n_cnn"], "α‑CNN": results["alpha_cnn"]}
    ours = page.setting([card["num_parameters"] for card in cards.values()])
    caption = (
        "The two networks, with rows × columns × filters after each pooling above, and below the kernel. "
        f"Trainable parameters: {ours}; the paper’s have {page.setting(list(paper.NUM_PARAMETERS))}."
    )
    alt = "Layers of both networks from the image to the predicted number."
    yield page.drawing(figures.architecture(cards), "Figure 4", caption, alt)
    if all(card["history"] for card in cards.values()):
        caption = "Loss by epoch (not in the paper); the weights kept are those of the lowest validation loss."
        yield page.drawing(
            figures.learning_curves(cards), "Learning curves", caption, "Training and validation loss by epoch."
        )

    def some(group: str, *keys: str) -> Callable[[dict[str, Any]], str]:
        return lambda card: ", ".join(page.setting(card[group][key]) for key in keys)

    facts: dict[str, Callable[[dict[str, Any]], str]] = {
        "training, validation images": lambda card: page.setting(
            [card["num_training_images"], card["num_validation_images"]]
        ),
        "trainable parameters": lambda card: page.setting(card["num_parameters"]),
        "filters of the convolutions": some("model", "filters"),
        "kernel size, dense, dropout, activation": some("model", "kernel_size", "dense", "dropout", "activation"),
        "optimiser, learning rate, batch": some("training", "optimizer", "learning_rate", "batch_size"),
        "epochs, of which kept": lambda card: page.setting([card["training"]["num_epochs"], card["epoch"]]),
        "loss, labels": some("training", "loss", "labels"),
        "target scaled by offset, scale": some("target_scaling", "offset", "scale"),
        "workers, threads of each, device": lambda card: page.setting(
            [card[key] for key in ("num_workers", "num_threads", "device")]
        ),
        "images/s while training": lambda card: f"{card['metrics']['images_per_second']:,.0f}",
        "time, start-up included": lambda card: page.duration(card["seconds"]),
        "run": lambda card: f"<code>{page.text(card['run'])}</code>",
    }
    rows = "".join(
        f'<tr><th scope="row">{title}</th>{"".join(f"<td>{fact(card)}</td>" for card in cards.values())}</tr>'
        for title, fact in facts.items()
    )
    heads = "".join(f'<th scope="col">{title}</th>' for title in cards)
    yield f'<table class="text"><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _cost(results: dict[str, Any]) -> str:
    """Return the stages of `raylens reproduce`, or what the runs and the evaluation themselves remember."""
    keys = ("seconds", "cpu_seconds", "gpu_seconds")
    stages = results.get("stages") or [
        *(
            {**card["metrics"], "stage": f"train {card['network']}", **{key: card.get(key) for key in keys}}
            for card in (results["n_cnn"], results["alpha_cnn"])
        ),
        {"stage": "evaluate", **results.get("cost", {})},
    ]
    times = {"seconds": "Time", "cpu_seconds": "CPU time", "gpu_seconds": "GPU time"}
    times = {key: title for key, title in times.items() if any(stage.get(key) for stage in stages)}
    rows = ""
    for stage in stages:
        costs = "".join(f"<td>{page.duration(stage.get(key))}</td>" for key in times)
        costs += f"<td>{page.plain(stage.get('images_per_second'), 0)}</td>"
        rows += f'<tr><th scope="row">{page.text(stage["stage"])}</th>{costs}</tr>'
    totals = "".join(f"<td>{page.duration(sum(stage.get(key) or 0 for stage in stages))}</td>" for key in times)
    heads = "".join(f'<th scope="col">{title}</th>' for title in times.values())
    machine = results.get("machine") or {}
    nouns = {"num_nodes": "node", "num_cpus": "CPU core", "num_gpus": "GPU"}
    held = [page.count(machine[key], noun) for key, noun in nouns.items() if key in machine]
    held += [page.text(machine["processor"])] if machine.get("processor") else []
    return (
        f'<table><thead><tr><th scope="col" class="left">Stage</th>{heads}<th scope="col">Images/s</th></tr></thead>'
        f'<tbody>{rows}<tr class="varied"><th scope="row">all</th>{totals}<td></td></tr></tbody></table>'
        + (f"<p>Machine: {', '.join(held)}.</p>" if held else "")
        + '<p class="quiet">The paper: over 4 hours to simulate 100,000 images (under 7 images/s), and under 2 hours '
        "to train for 100 epochs of 100,000 images on one GPU (over 1,389 images/s).</p>"
    )


def _provenance(results: dict[str, Any]) -> str:
    versions = {**results["n_cnn"].get("versions", {}), **results["versions"]}
    test_sets = "".join(
        f'<tr><th scope="row">{page.text(entry["split"])}</th><td>{entry["num_images"]:,}</td>'
        f"<td><code>{page.text(entry['digest'])}</code></td><td><code>{page.text(entry['dataset'])}</code></td></tr>"
        for entry in results["datasets"]
    )
    settings = "".join(
        f'<tr><th scope="row"><code>{page.text(key)}</code></th><td>{page.setting(value)}</td></tr>'
        for key, value in paper.flat(results["simulation"]).items()
    )
    recipe = results.get("experiment") or {
        "name": results["recipe"],
        "simulation": results["simulation"],
        **{name: {key: results[name][key] for key in ("model", "training")} for name in ("n_cnn", "alpha_cnn")},
    }
    heads = "".join(f'<th scope="col">{title}</th>' for title in ("Test set", "Images", "Simulation", "Dataset"))
    return (
        f"<p>Simulation <code>{page.text(results['digest'])}</code>, made and read with "
        f"{', '.join(f'{page.text(name)} {page.text(version)}' for name, version in versions.items())}.</p>"
        f'<table class="text"><thead><tr>{heads}</tr></thead><tbody>{test_sets}</tbody></table>'
        "<details><summary>The simulation, setting by setting</summary>"
        f'<table class="text"><tbody>{settings}</tbody></table></details>'
        "<details><summary>The recipe as JSON</summary>"
        f"<pre>{page.text(json.dumps(recipe, indent=2, ensure_ascii=False))}</pre></details>"
    )


def _paper_cell(value: float | None, digits: int) -> str:
    """Return a cell with a number of the paper, padded where that is an integer, so that points line up."""
    if value is None:
        return page.cell(None, digits)
    padding = "\u2008" + "\u2007" * digits if isinstance(value, int) else ""  # as wide as a point, and as a digit
    return f'<td><data value="{value!r}">{figures.printed(value, digits)}{padding}</data></td>'
