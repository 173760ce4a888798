"""results.json to one HTML page: our numbers beside the paper's and beside what needs no image.

The page holds its style and its figures (SVG in data URIs) and loads nothing. Every number in a table
stands in a `<data>` element whose value has all digits; what is shown is rounded. The paper's numbers
are its tables 1 to 4; which of them fits follows from the geometry and the pixels of the simulation.
Whatever text comes out of a file is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from matplotlib.figure import Figure

from raylens import figures, recipes
from raylens.config import Experiment

_MEASURES = {"gradient": "Gradient", "sigma": "σ", "rmse": "RMSE"}  # what the paper has; we add the bias


@dataclass(frozen=True)
class _Network:
    """How the numbers of one network are told."""

    title: str
    symbol: str
    plot_symbol: str
    digits: int  # of sigma, RMSE and bias
    baselines: dict[str, str]  # its name in results.json, and here


_CONSTANT_N, _CONSTANT_ALPHA = (
    {"n_constant": "constant"},
    {"alpha_constant": "constant", "alpha_from_true_n": "true N alone"},
)
_NETWORKS = {
    "n_cnn": _Network("N-CNN: the number of subhaloes N", "N", "$N$", 1, _CONSTANT_N),
    "alpha_cnn": _Network("α-CNN, given the predicted N: the slope α", "α", r"$\alpha$", 3, _CONSTANT_ALPHA),
    "alpha_cnn_true_n": _Network("α-CNN, given the true N: the slope α", "α", r"$\alpha$", 3, _CONSTANT_ALPHA),
}


@dataclass(frozen=True)
class _Paper:
    """What the paper says of one network on one kind of images."""

    table: str
    figure: str
    experiment: Experiment
    measures: dict[float | None, dict[str, float | None]]  # by alpha; None: varied


_FIGURES: dict[str, tuple[str, Callable[[], Experiment]]] = {
    "table_1": ("Figure 5", recipes.paper_fixed),
    "table_2": ("Figure 6", recipes.paper_fixed_coarse),
    "table_3": ("Figure 7", recipes.paper_varied),
    "table_4": ("Figure 8", recipes.paper_varied),
}


def report(results: list[dict[str, Any]]) -> str:
    """Return one self-contained HTML page on some results, each as `raylens evaluate` makes them.

    Raises
    ------
    ValueError
        If one of them is anything else.
    """
    for one in results:
        _require_results(one)
    names = ", ".join(one["recipe"] for one in results)
    sections = [_experiment(number, one) for number, one in enumerate(results, 1)]
    body = [_opening(results), *sections, _NOTES]
    page = Template(files("raylens").joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(title=escape(f"raylens: {names}"), body="\n".join(body))


def _require_results(results: Any) -> None:
    """Refuse what is not a results.json; what is optional in one (stages, machine) is not asked for."""
    try:
        for name in ("n_cnn", "alpha_cnn"):
            results[name]["num_training_images"], results[name]["history"], results[name]["training"]["num_epochs"]
        results["recipe"], results["digest"], results["versions"], results["illustration"]
        results["simulation"]["camera"]["num_pixels"], results["simulation"]["lens"]["theta_E"]
        for entry in results["datasets"]:
            entry["split"], entry["alpha"], entry["num_images"], entry["truth"]["num_subhalos"]
            for name in _NETWORKS.keys() & entry.keys():
                sum(
                    value
                    for value in (*entry[name].values(), *entry["baselines"]["n_constant"].values())
                    if value is not None
                )
            entry["n_cnn"]["rmse"], entry["alpha_cnn"]["rmse"], entry["figures"]["n_cnn"]["scatter"]
        results["datasets"][0]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else "its shape is another"
        raise ValueError(f"this is not a results.json of `raylens evaluate`: {missing}.") from None


def _opening(results: list[dict[str, Any]]) -> str:
    lead = (
        "<h1>What a lens says of its dark subhaloes</h1>"
        '<p class="quiet">Two networks read the number N of subhaloes and the slope α of their mass function from images '
        "of strong lenses. Here are our numbers beside those of the paper (doi:10.1137/22S1478033) and beside baselines "
        "that never see an image.</p>"
    )
    if len(results) == 1:
        return f"<header>{lead}</header>"
    rows = []
    for number, one in enumerate(results, 1):
        papers, entry = _papers(one), _main_set(one)
        cells = "".join(
            _cell(entry[name][measure], digits, "ours first")
            + _paper_cell(_of_paper(papers.get(name), one, entry, measure), digits)
            for name, measure, digits in _HEADLINE
        )
        rows.append(f'<tr><th scope="row"><a href="#experiment-{number}">{escape(one["recipe"])}</a></th>{cells}</tr>')
    heads = "".join(
        f'<th colspan="2" scope="colgroup" class="first">{_headline_title(*item)}</th>' for item in _HEADLINE
    )
    sub = '<th scope="col" class="ours first">ours</th><th scope="col">paper</th>' * len(_HEADLINE)
    return (
        f'<header>{lead}<nav><table class="measures"><caption>At a glance, where α varies</caption><thead>'
        f'<tr><th scope="col" rowspan="2">Experiment</th>{heads}</tr><tr class="sub">{sub}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></nav></header>"
    )


# What stands at the top: the network, its measure, digits.
_HEADLINE = (("n_cnn", "gradient", 3), ("n_cnn", "rmse", 1), ("alpha_cnn", "gradient", 3), ("alpha_cnn", "rmse", 3))


def _headline_title(name: str, measure: str, digits: int) -> str:
    return f"{_MEASURES[measure]} of {_NETWORKS[name].symbol}"


def _experiment(number: int, results: dict[str, Any]) -> str:
    papers = _papers(results)
    return "\n".join(
        [
            f'<section class="experiment" id="experiment-{number}">',
            f"<h2>{escape(results['recipe'])}</h2>",
            f"<p>{_what_was_done(results)}</p>",
            _headline(results, papers),
            _baselines_explained(results, papers),
            _differences(results, papers),
            "<h3>Results</h3>",
            *(_measures(results, name, papers.get(name)) for name in _NETWORKS if name in _main_set(results)),
            '<p class="quiet">Ratio: ours over the paper’s. Bias: mean of predicted − true, which the paper does not give. '
            "Where α is held, the constant is right by luck near its own value (α = −2); "
            "compare with it in the row Varied. <a href='#notes'>Notes</a> on reading the paper’s numbers.</p>",
            *_prediction_figures(results, papers),
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


def _papers(results: dict[str, Any]) -> dict[str, _Paper]:
    """Return, for each network, the paper's table of the same geometry and the same pixels, if there is one."""
    simulation = results["simulation"]
    camera, lens, source = simulation["camera"], simulation["lens"], simulation["source"]
    if isinstance(lens["theta_E"], dict) or isinstance(source["z"], dict):
        geometry = "varied"
    else:
        geometry = (
            "neither" if any(isinstance(value, dict) for value in (*lens.values(), *source.values())) else "fixed"
        )
    found = {}
    tables = json.loads(files("raylens").joinpath("paper_tables.json").read_text(encoding="utf-8"))["tables"]
    for key, table in tables.items():
        same_pixels = camera["num_pixels"] == table["num_pixels"] and math.isclose(
            camera["pixel_scale"], table["pixel_scale_arcsec"]
        )
        if not same_pixels or table["lens_geometry"] != geometry:
            continue
        figure, recipe = _FIGURES[key]
        true_n = table["alpha_cnn_number_input"] == "true"
        for name in ("n_cnn", "alpha_cnn"):
            measures = {
                None if row["alpha"] == "varied" else row["alpha"]: row[name] for row in table["rows"] if name in row
            }
            if measures:
                title = key.replace("_", " ").capitalize()
                found[f"{name}_true_n" if true_n else name] = _Paper(title, figure, recipe(), measures)
    return found


def _main_set(results: dict[str, Any]) -> dict[str, Any]:
    """Return the first test set with alpha varied, or the first of all."""
    return next((entry for entry in results["datasets"] if entry["alpha"] is None), results["datasets"][0])


def _of_paper(paper: _Paper | None, results: dict[str, Any], entry: dict[str, Any], measure: str) -> float | None:
    """Return the paper's number for a test set; one of another simulation than the first has none."""
    if paper is None or entry["digest"] != results["digest"]:
        return None
    return paper.measures.get(entry["alpha"], {}).get(measure)


def _what_was_done(results: dict[str, Any]) -> str:
    camera = results["simulation"]["camera"]
    cards = results["n_cnn"], results["alpha_cnn"]
    trained = " and ".join(
        f"the {title} for {_count(len(card['history']) or card['training']['num_epochs'], 'epoch')}"
        for title, card in zip(("N-CNN", "α-CNN"), cards, strict=True)
    )
    numbers = sorted({card["num_training_images"] for card in cards})
    on = " and ".join(f"{number:,}" for number in numbers)
    num_tested = sum(entry["num_images"] for entry in results["datasets"])
    return (
        f"Simulated images of {camera['num_pixels']} × {camera['num_pixels']} pixels at {camera['pixel_scale']:g} arcsec: "
        f"{on} trained {trained}, {cards[0]['num_validation_images']:,} chose the epoch to keep, and {num_tested:,}, unseen "
        f"until then, tested both in {_count(len(results['datasets']), 'set')}. The numbers below are those of the set "
        f"{escape(_main_set(results)['split'])} ({_main_set(results)['num_images']:,} images)."
    )


def _headline(results: dict[str, Any], papers: dict[str, _Paper]) -> str:
    entry, cards = _main_set(results), []
    for name, measure, digits in _HEADLINE:
        ours = entry[name][measure]
        paper = _of_paper(papers.get(name), results, entry, measure)
        compared = (
            [("ours", ours, "ours"), ("paper", paper, "paper")] if paper is not None else [("ours", ours, "ours")]
        )
        compared += [(title, entry["baselines"][key][measure], "") for key, title in _NETWORKS[name].baselines.items()]
        largest = max((value or 0 for _, value, _ in compared), default=0) or 1
        rows = "".join(
            f'<tr><th scope="row">{title}</th><td class="bar" aria-hidden="true"><span class="{kind}" '
            f'style="width:{max(0, 100 * (value or 0) / largest):.1f}%"></span></td>'
            + (_paper_cell(value, digits) if kind == "paper" else _cell(value, digits))
            + "</tr>"
            for title, value, kind in compared
        )
        cards.append(
            f'<div class="card"><h3>{_headline_title(name, measure, digits)}</h3>'
            f'<p class="value">{_number(ours, digits)}</p><table><tbody>{rows}</tbody></table></div>'
        )
    return f'<div class="headline">{"".join(cards)}</div>'


def _baselines_explained(results: dict[str, Any], papers: dict[str, _Paper]) -> str:
    entry = _main_set(results)
    n, alpha, baselines = entry["n_cnn"], entry["alpha_cnn"], entry["baselines"]
    against = []
    for name, constant in (("n_cnn", "n_constant"), ("alpha_cnn", "alpha_constant")):
        ours, paper = entry[name]["rmse"], _of_paper(papers.get(name), results, entry, "rmse")
        of_paper = f"{ours / paper:.2f} of the paper’s and " if paper else ""
        against.append(
            f"the RMSE of {_NETWORKS[name].symbol} is {of_paper}{ours / baselines[constant]['rmse']:.2f} of a constant’s"
        )
    best = " and ".join(
        f"{_best_gradient(measured['rmse'], baselines[constant]):.3f} for {symbol}"
        for measured, constant, symbol in ((n, "n_constant", "N"), (alpha, "alpha_constant", "α"))
    )
    ratio = alpha["rmse"] / baselines["alpha_from_true_n"]["rmse"]
    return (
        f"<p>In short, {'; '.join(against)}; the true N alone predicts α with an RMSE of which ours is {ratio:.2f} times.</p>"
        '<ul class="quiet"><li><b>constant</b>: the mean of the training labels, whatever the image.</li>'
        "<li><b>true N alone</b>: the mean α of training lenses with that N; it knows the true N and sees no image.</li>"
        "<li>The best possible prediction has gradient 1 − RMSE² / variance, so a gradient of 1 is not the goal: "
        f"at our RMSE it would be {best}. Rank by RMSE, and look at the bias.</li></ul>"
    )


def _best_gradient(rmse: float, constant: dict[str, float]) -> float:
    variance = constant["rmse"] ** 2 - constant["bias"] ** 2  # of the true values
    return 1 - rmse**2 / variance if variance > 0 else 0.0


def _differences(results: dict[str, Any], papers: dict[str, _Paper]) -> str:
    """Return in which settings this is not the paper's experiment."""
    trained_elsewhere = {results[name].get("dataset_digest") for name in ("n_cnn", "alpha_cnn")} - {results["digest"]}
    lines = []
    if trained_elsewhere:
        lines.append(
            f"The networks were trained on images of another simulation ({escape(', '.join(map(str, trained_elsewhere)))}) "
            f"than the test sets ({escape(results['digest'])})."
        )
    if not papers:
        lines.append(
            "No table of the paper has this geometry and these pixels (fixed, 60 at 0.1 arcsec or 30 at 0.2 arcsec; "
            "varied, 60 at 0.1 arcsec), so our numbers stand alone."
        )
    else:
        paper = papers["n_cnn"]
        theirs = _flat(paper.experiment.as_dict())
        changes: dict[str, str] = {}
        for key, value in _flat(_as_experiment(results)).items():
            if key in theirs and theirs[key] != value and not key.endswith((".seed", ".engine", ".catalogue")):
                # What both networks share is said once.
                short = key.split(".", 1)[1]
                changes[short] = f"<code>{escape(short)}</code> {_setting(value)} (paper {_setting(theirs[key])})"
        if changes:
            lines.append(
                f"Not the paper’s ({paper.table.lower()}, {paper.figure.lower()}): {'; '.join(changes.values())}."
            )
    return "".join(f'<p class="warning">{line}</p>' for line in lines)


def _as_experiment(results: dict[str, Any]) -> dict[str, Any]:
    """Return what was done in the shape of an Experiment, as far as results tell."""
    num_images = {"num_images": {"train": results["n_cnn"]["num_training_images"]}}
    for entry in results["datasets"]:
        num_images["num_images"]["test" if entry["alpha"] is None else "test_alpha"] = entry["num_images"]
    networks = {name: {key: results[name][key] for key in ("model", "training")} for name in ("n_cnn", "alpha_cnn")}
    return {"simulation": results["simulation"], "images": num_images, **num_images, **networks}


def _measures(results: dict[str, Any], name: str, paper: _Paper | None) -> str:
    """Return the table of one network: a row for each test set, the varied one last, as in the paper."""
    network = _NETWORKS[name]
    entries = sorted(results["datasets"], key=lambda entry: (entry["alpha"] is None, -(entry["alpha"] or 0)))
    three = ("ours", "paper", "ratio") if paper else ("ours",)
    groups = "".join(
        f'<th colspan="{len(three)}" scope="colgroup" class="first">{title}</th>'
        if paper
        else f'<th scope="col" class="first">{title}</th>'
        for title in _MEASURES.values()
    )
    sub = "".join(f'<th scope="col"{_class(of)}>{of}</th>' for of in three * len(_MEASURES))
    sub += '<th scope="col" class="ours first">ours</th>' + "".join(
        f'<th scope="col"{" class=first" if place == 0 else ""}>{title}</th>'
        for place, title in enumerate(network.baselines.values())
    )
    rows = []
    for entry in entries:
        cells = ""
        for measure in _MEASURES:
            digits = 3 if measure == "gradient" else network.digits
            ours, theirs = entry[name][measure], _of_paper(paper, results, entry, measure)
            cells += _cell(ours, digits, "ours first")
            if paper:
                cells += _paper_cell(theirs, digits)
                cells += _cell(ours / theirs if theirs and ours is not None else None, 2)
        cells += _cell(entry[name]["bias"], network.digits, "ours first", signed=True)
        for place, key in enumerate(network.baselines):
            cells += _cell(entry["baselines"][key]["rmse"], network.digits, "first" if place == 0 else "")
        title = "Varied" if entry["alpha"] is None else f"{entry['alpha']:.1f}".replace("-", "−")
        if entry["digest"] != results["digest"]:
            title += f" (simulation {escape(entry['digest'])})"
        kind = ' class="varied"' if entry["alpha"] is None else ""
        rows.append(f'<tr{kind}><th scope="row">{title}</th><td>{entry["num_images"]:,}</td>{cells}</tr>')
    beside = f"beside the paper’s {paper.table.lower()}" if paper else "the paper has no such table"
    return (
        f'<table class="measures" id="{name}"><caption>{network.title} <span class="quiet">({beside})</span></caption>'
        f'<thead><tr><th scope="col" rowspan="2" style="text-align:left">α</th><th scope="col" rowspan="2">Images</th>{groups}'
        f'<th scope="col" class="first">Bias</th><th colspan="{len(network.baselines)}" scope="colgroup" class="first">'
        f'RMSE without image</th></tr><tr class="sub">{sub}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _class(of: str) -> str:
    return ' class="ours first"' if of == "ours" else ""


def _prediction_figures(results: dict[str, Any], papers: dict[str, _Paper]) -> Iterable[str]:
    entries = results["datasets"]
    for names in (("n_cnn", "alpha_cnn"), ("alpha_cnn_true_n",)):
        if not all(name in entry for name in names for entry in entries):
            continue
        paper = papers.get(names[0])
        networks = {
            name: (_NETWORKS[name].plot_symbol, _NETWORKS[name].digits, papers[name].measures if name in papers else {})
            for name in names
        }
        which = "N (top) and α (bottom)" if len(names) == 2 else "α from the image and the true N"
        title = paper.figure if paper else f"As figure {5 if len(names) == 2 else 8}"
        caption = (
            f"Predictions of {which}. Left: density of predicted against true values where α varies, with the line fitted to "
            "them. Right: errors of prediction at each α, and where it varies (dashed)."
        )
        if paper:
            caption += (
                " The dotted line has the paper’s gradient and goes through our mean, as the paper gives no intercept."
            )
        told = "; ".join(
            f"{_NETWORKS[name].symbol}: gradient {_plain(_main_set(results)[name]['gradient'], 3)}, "
            f"RMSE {_plain(_main_set(results)[name]['rmse'], _NETWORKS[name].digits)}"
            for name in names
        )
        yield _figure(
            figures.predictions(entries, networks), title, caption, f"Predicted against true, and errors. {told}."
        )


def _lens_figures(results: dict[str, Any]) -> Iterable[str]:
    simulation, illustration, entry = results["simulation"], results["illustration"], _main_set(results)
    varying = [name for name in entry["truth"] if name in figures.QUANTITIES and figures.varies(name, simulation)]
    lens = simulation["lens"]
    caption = f"Number densities of what varies in the set {escape(entry['split'])}."
    if not {"theta_E", "q", "phi", "x", "y", "z_source"} & set(varying):
        caption += (
            f" The geometry is fixed: θ<sub>E</sub> = {lens['theta_E']:g} arcsec, q = {lens['q']:g}, φ = {lens['phi']:g}, "
            f"(x, y) = ({lens['x']:g}, {lens['y']:g}) arcsec, source redshift {simulation['source']['z']:g}."
        )
    yield _figure(figures.distributions(entry["truth"], simulation), "Figure 1", caption, "Histograms of what varies.")
    if illustration is None:
        yield "<p>The dataset holds no illustration.json, so figures 2 and 3 are not drawn.</p>"
        return
    caption = (
        "Subhaloes of one lens at α = −2.4, −2.0 and −1.6. Top: their masses, and (dashed) what M<sup>α</sup> leads to expect of "
        "as many. Bottom: where they lie; the area of a dot grows with the subhalo’s Einstein radius."
    )
    if not varying or varying == ["alpha"]:
        caption += " The circle has radius 2 θ<sub>E</sub>."
    yield _figure(
        figures.populations(illustration, simulation), "Figure 2", caption, "Masses and positions of subhaloes."
    )
    example = illustration["example"]
    caption = (
        f"One lens of the test set. Left: the source in its own plane. Middle: surface mass density of lens and subhaloes in "
        f"critical units. Right: the image that a network sees, with the subhaloes drawn in. α = {_plain(example['alpha'], 2)}, "
        f"θ<sub>E</sub> = {example['theta_E']:.2f} arcsec, q = {example['q']:.2f}, φ = {example['phi']:.2f}, "
        f"source redshift {example['z_source']:.2f}."
    )
    if simulation["subhalos"]["compensation"] == "none":
        caption += (
            " The main lens is not lightened by the mass of its subhaloes, so the ring lies outside θ<sub>E</sub>."
        )
    yield _figure(figures.example(illustration), "Figure 3", caption, "Source, surface density and lensed image.")


def _figure(figure: Figure, title: str, caption: str, alt: str) -> str:
    return (
        f'<figure><img src="{figures.data_uri(figure)}" alt="{escape(alt)}">'
        f"<figcaption><b>{title}.</b> {caption}</figcaption></figure>"
    )


def _training(results: dict[str, Any]) -> Iterable[str]:
    cards = {"N-CNN": results["n_cnn"], "α-CNN": results["alpha_cnn"]}
    if all(card["history"] for card in cards.values()):
        caption = "Loss of the standardised target by epoch, and the epoch whose weights are kept: the lowest validation loss."
        yield _figure(
            figures.learning_curves(cards), "Learning curves", caption + " Not in the paper.", "Losses by epoch."
        )
    facts: dict[str, Callable[[dict[str, Any]], str]] = {
        "training, validation images": lambda card: (
            f"{card['num_training_images']:,}, {card['num_validation_images']:,}"
        ),
        "trainable parameters": lambda card: f"{card['num_parameters']:,}",
        "convolutions": lambda card: (
            f"{card['model']['kernel_size']} × {card['model']['kernel_size']}, filters {_setting(card['model']['filters'])}"
        ),
        "dense, dropout, activation": lambda card: ", ".join(
            _setting(card["model"][key]) for key in ("dense", "dropout", "activation")
        ),
        "optimiser, learning rate, batch": lambda card: ", ".join(
            _setting(card["training"][key]) for key in ("optimizer", "learning_rate", "batch_size")
        ),
        "epochs, kept": lambda card: f"{card['training']['num_epochs']}, {card['epoch']}",
        "target standardised by": lambda card: (
            f"mean {_setting(card['target_scaling']['mean'])}, sd {_setting(card['target_scaling']['sd'])}"
        ),
        "workers × threads, device": lambda card: (
            f"{card['num_workers']} × {card['num_threads']}, {escape(card['device'])}"
        ),
        "images/s while training": lambda card: f"{card['metrics']['images_per_second']:,.0f}",
        "time, start-up included": lambda card: _duration(card["seconds"]),
        "run": lambda card: f"<code>{escape(card['run'])}</code>",
    }
    rows = "".join(
        f'<tr><th scope="row">{title}</th>{"".join(f"<td>{fact(card)}</td>" for card in cards.values())}</tr>'
        for title, fact in facts.items()
    )
    heads = "".join(f'<th scope="col" style="text-align:left">{title}</th>' for title in cards)
    yield (
        f'<table class="text"><caption>The networks and their training</caption><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _cost(results: dict[str, Any]) -> str:
    stages = results.get("stages") or [
        *(
            {
                "stage": f"train {card['network']}",
                "seconds": card["seconds"],
                "images_per_second": card["metrics"]["images_per_second"],
            }
            for card in (results["n_cnn"], results["alpha_cnn"])
        ),
        *({**entry, "stage": f"predict {entry['split']}"} for entry in results["datasets"]),
    ]
    times = {"seconds": "Time", "cpu_seconds": "CPU time", "gpu_seconds": "GPU time"}
    times = {key: title for key, title in times.items() if any(stage.get(key) for stage in stages)}
    rows = ""
    for stage in stages:
        cells = "".join(f"<td>{_duration(stage.get(key))}</td>" for key in times)
        rows += (
            f'<tr><th scope="row">{escape(stage["stage"])}</th>{cells}{_cell(stage.get("images_per_second"), 0)}</tr>'
        )
    totals = "".join(f"<td>{_duration(sum(stage.get(key) or 0 for stage in stages))}</td>" for key in times)
    rows += f'<tr class="varied"><th scope="row">all</th>{totals}<td></td></tr>'
    heads = "".join(f'<th scope="col">{title}</th>' for title in times.values())
    machine = results.get("machine") or {}
    counts = (
        [_count(machine[f"num_{noun}s"], noun) for noun in ("node", "CPU", "GPU") if f"num_{noun.lower()}s" in machine]
        if 0
        else []
    )
    counts = [
        _count(machine[key], noun)
        for key, noun in (("num_nodes", "node"), ("num_cpus", "CPU core"), ("num_gpus", "GPU"))
        if key in machine
    ]
    if machine.get("processor"):
        counts.append(escape(str(machine["processor"])))
    return (
        f'<table><thead><tr><th scope="col" style="text-align:left">Stage</th>{heads}<th scope="col">Images/s</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        + (f"<p>Machine: {', '.join(counts)}.</p>" if counts else "")
        + '<p class="quiet">The paper: more than 4 hours to simulate 100,000 images (under 7 images/s), and less than 2 hours '
        "to train 100 epochs of 100,000 images on one GPU (over 1,389 images/s).</p>"
    )


def _provenance(results: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(entry['split'])}</th><td>{entry['num_images']:,}</td>"
        f"<td><code>{escape(entry['digest'])}</code></td><td><code>{escape(entry['dataset'])}</code></td></tr>"
        for entry in results["datasets"]
    )
    settings = "".join(
        f"<tr><th scope='row'><code>{escape(key)}</code></th><td>{_setting(value)}</td></tr>"
        for key, value in _flat(results["simulation"]).items()
    )
    versions = {**results["n_cnn"].get("versions", {}), **results["versions"]}
    recipe = results.get("experiment") or {
        "name": results["recipe"],
        "simulation": results["simulation"],
        **{name: {key: results[name][key] for key in ("model", "training")} for name in ("n_cnn", "alpha_cnn")},
    }
    return (
        f"<p>Digest of the simulation: <code>{escape(results['digest'])}</code>. Versions: "
        f"{', '.join(f'{escape(str(name))} {escape(str(version))}' for name, version in versions.items())}.</p>"
        '<table class="text"><caption>Test sets</caption><thead><tr><th scope="col" style="text-align:left">Split</th>'
        '<th scope="col">Images</th><th scope="col">Digest</th><th scope="col">Dataset</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
        "<details><summary>The simulation, setting by setting</summary>"
        f'<table class="text"><tbody>{settings}</tbody></table></details>'
        f"<details><summary>The recipe as JSON</summary><pre>{escape(json.dumps(recipe, indent=2, ensure_ascii=False))}</pre></details>"
    )


_NOTES = """<section id="notes">
<h3>Notes on the paper’s numbers</h3>
<ul>
<li>Gradient: slope of the straight line fitted to predicted against true. σ: half the width of the central 68 % of the
errors. RMSE: root of the mean squared error. Errors are predicted − true.</li>
<li>In the row Varied of tables 1, 2 and 4 the paper’s σ of α exceeds its RMSE, by a factor of up to 1.78; errors with one
peak allow about 1.18. So do not hold our σ of α against the paper’s in that row.</li>
<li>The paper’s α-CNN with predicted N has, where α varies, an RMSE of 0.294 (table 1), 0.290 (table 2) and 0.380 (table 3);
predicting −2 always has 0.289.</li>
<li>With varied geometry the abstract says that N gets worse by 57 %, where the gradients of tables 1 and 3 give 61 %;
section 4 says 81 %, which is the drop of α. The text says that N is over-predicted by 115 at α = −1.6, where σ and RMSE of
table 3 give about 182.</li>
<li>Figure 4, the architecture, is not redrawn; the trainable parameters above can be held against its 1,671,393 (N-CNN) and
3,687,522 (α-CNN).</li>
</ul>
</section>"""


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys; a distribution is one value."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict) and not {"uniform", "normal"} & value.keys():
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _setting(value: Any) -> str:
    """Return a setting as a person writes it."""
    if isinstance(value, dict) and "uniform" in value:
        low, high = value["uniform"]
        return f"uniform {_setting(low)} to {_setting(high)}"
    if isinstance(value, dict) and "normal" in value:
        mean, sd, low, high = map(_setting, value["normal"])
        return f"normal {mean} ± {sd}, {low} to {high}"
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return escape(str(value))


def _cell(value: float | None, digits: int, kind: str = "", *, signed: bool = False) -> str:
    opening = f'<td class="{kind}">' if kind else "<td>"
    return f"{opening}{_number(value, digits, signed=signed)}</td>"


def _paper_cell(value: float | None, digits: int) -> str:
    """Return a cell with a number of the paper, padded where the paper has an integer, so that points line up."""
    if value is None:
        return _cell(None, digits)
    padding = "\u2008" + "\u2007" * digits if isinstance(value, int) else ""  # as wide as a point and digits
    return f'<td><data value="{value!r}">{figures.printed(value, digits)}{padding}</data></td>'


def _number(value: float | None, digits: int, *, signed: bool = False) -> str:
    if value is None:
        return '<span class="none">–</span>'
    return f'<data value="{value!r}">{_plain(value, digits, signed=signed)}</data>'


def _plain(value: float | None, digits: int, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:{'+' if signed else ''}z,.{digits}f}".replace("-", "−")


def _count(number: float, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return '<span class="none">–</span>'
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
