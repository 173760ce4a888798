"""The command line: one verb a stage.

Standard output ends with one JSON object, the facts of the run; progress goes to standard error.
Exit status: 0 done; 1 failed, with one line `error: ...`; 2 wrong usage. The verbs import what
they need when they run: `raylens --help` should not wait for Ray and torch.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import deque
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Annotated, Any, NoReturn, Self, TextIO, get_args

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from raylens import __version__, recipes, storage
from raylens.campaign import Campaign
from raylens.config import Experiment, Simulation, check_key
from raylens.config import Network as NetworkSettings
from raylens.search import spelled_out

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Strong-lens simulation, training, search and evaluation at scale, on Ray.",
    epilog="Anywhere on the line: --quiet prints nothing but the JSON line at the end, --debug shows tracebacks.",
)

Recipe = Annotated[str, typer.Argument(help="a recipe's name, a .toml or .json file, or a dataset", show_default=False)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting, e.g. lens.theta_E=1.2")
]
To = Annotated[str, typer.Option("--to", help="where to: a local path or s3://bucket/prefix", show_default=False)]
NCNN = Annotated[str, typer.Option("--n-cnn", help="the run of an N-CNN", show_default=False)]
AlphaCNN = Annotated[str, typer.Option("--alpha-cnn", help="the run of an alpha-CNN", show_default=False)]
Data = Annotated[str, typer.Option("--data", help="the dataset to train on", show_default=False)]


def run() -> NoReturn:
    """Run the command line of this process, and end it."""
    # Standard output stays ours to the end: Ray prints of workers that died when all else is done.
    out, sys.stdout = sys.stdout, sys.stderr
    sys.exit(main(out=out))


def main(arguments: list[str] | None = None, out: TextIO | None = None) -> int:
    """Run a command line and return its exit status; what it has to say goes to `out`, or standard output."""
    words = sys.argv[1:] if arguments is None else arguments
    _Talk.quiet, _Talk.debug, _Talk.out = "--quiet" in words, "--debug" in words, out or sys.stdout
    level = logging.DEBUG if _Talk.debug else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    # At DEBUG it writes each request's headers, with the session token and a signature that can be used again.
    logging.getLogger("botocore").setLevel(max(level, logging.INFO))
    try:
        # Ray prints warnings of its own, at any time; standard output is for ours.
        with redirect_stdout(_Talk.out if "--help" in words else sys.stderr):
            status = app([word for word in words if word not in ("--quiet", "--debug")], standalone_mode=False)
        if status == 130:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        # Only train and tune take care not to go on unasked.
        how = "with --resume" if {"train", "tune"} & set(words) and "--resume" not in words else "again"
        return _fail(f"interrupted; run the same command {how} to go on.")
    except Exception as error:
        if _Talk.debug:
            raise
        if hasattr(error, "format_message"):  # typer's own: the line was not understood
            return _fail(f"{_sentence(error.format_message())} See raylens --help.", 2)
        return _fail(_explanation(error))


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    if version:
        _finish(raylens=__version__)
        raise typer.Exit


@app.command("recipes")
def list_recipes() -> None:
    """List the recipes, one line each."""
    for name, recipe in recipes.RECIPES.items():
        _say(f"{name:20} {(recipe.__doc__ or '').strip()}")
    _finish(recipes=list(recipes.RECIPES))


@app.command()
def show(recipe: Recipe, settings: Set = None) -> None:
    """Print a recipe in full, as JSON that is itself a recipe file, and its digest."""
    experiment = recipes.load(recipe).override(_changes(settings))
    values = {**experiment.as_dict(), "digest": experiment.simulation.digest}
    # For people over many lines; for files and pipes on one, which is also the last.
    print(json.dumps(values, indent=2 if _Talk.out.isatty() else None), file=_Talk.out)


@app.command()
def simulate(
    recipe: Recipe,
    to: To,
    split: Annotated[
        str | None,
        typer.Option(help="train, validation, test, or test-alpha-1.6 ... test-alpha-2.4; train", show_default=False),
    ] = None,
    num_images: Annotated[
        int | None, typer.Option(min=1, help="how many images; as the recipe says", show_default=False)
    ] = None,
    shard_size: Annotated[int | None, typer.Option(min=1, help="images in a file; 1024", show_default=False)] = None,
    settings: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be done, and do nothing")] = False,
) -> None:
    """Simulate a split of a recipe into Parquet below a root, or what is missing of it.

    A dataset as recipe is made again, or finished, with its own split, number of images and shard size.
    """
    from raylens import dataset

    experiment = recipes.load(recipe)
    model = dataset.read_plan(storage.absolute(recipe)) if recipes.may_be_dataset(recipe) else None
    if model is not None:
        dataset.require_same_simulator(recipe, model)
    changes = _changes(settings)
    for key in changes:
        check_key(Simulation, key)
    simulation = experiment.simulation.override(changes)
    split = split or (model.split if model else "train")
    dataset.check_split(split)
    num_images = num_images or experiment.num_images.of(split)
    shard_size = shard_size or (model.shard_size if model else None)
    if dry_run:
        _foresee(experiment.name, simulation, to, split=split, num_images=num_images, shard_size=shard_size)
        return
    from raylens import generate

    simulated = generate.simulate(
        simulation,
        to,
        recipe=experiment.name,
        split=split,
        num_images=num_images,
        shard_size=shard_size,
        progress=_Meter(f"simulate {split}", "images"),
    )
    _say(
        f"{simulated.num_images:,} images in {simulated.num_shards} shards: {simulated.num_made} made, "
        f"{simulated.num_skipped} stood already."
    )
    _finish(**asdict(simulated))


def _foresee(
    recipe: str, simulation: Simulation, to: str, *, split: str, num_images: int, shard_size: int | None
) -> None:
    """Say what `simulate` would make, where, and what that would cost."""
    from raylens import dataset, generate
    from raylens.simulate import require_drawable

    require_drawable(simulation, split)
    storage.check_writable(to)
    uri = dataset.location(to, recipe=recipe, split=split, simulation=simulation)
    plan = dataset.plan_for(
        uri, recipe=recipe, split=split, simulation=simulation, num_images=num_images, shard_size=shard_size
    )
    estimate = generate.estimate(uri, plan)
    _say(
        f"{uri} would hold {plan.num_images:,} images in {plan.num_shards} shards, "
        f"about {estimate.bytes / 1e6:,.0f} MB; {estimate.num_standing} shards stand. "
        f"The rest takes about {estimate.cpu_hours:.3g} CPU-hours of such a core as this one has, {estimate.where}."
    )
    _finish(dataset=uri, num_images=plan.num_images, num_shards=plan.num_shards, **asdict(estimate))


@app.command()
def verify(dataset: Annotated[str, typer.Argument(help="the dataset", show_default=False)]) -> int:
    """Check that a dataset is complete and that every checksum holds."""
    from raylens import dataset as datasets

    started = time.perf_counter()
    wrong = datasets.verify(dataset)
    for line in wrong:
        _say(line)
    plan = datasets.read_plan(storage.absolute(dataset))
    _finish(
        dataset=storage.absolute(dataset),
        sound=not wrong,
        wrong=wrong,
        num_images=plan.num_images,
        num_shards=plan.num_shards,
        seconds=time.perf_counter() - started,
    )
    if wrong:
        return _fail(f"{dataset} is not sound: {wrong[0].removesuffix('.')}. {_cure(storage.absolute(dataset), wrong)}")
    return 0


def _cure(dataset: str, wrong: list[str]) -> str:
    """Return what mends a dataset, the first of whose faults is told."""
    from raylens import dataset as datasets

    plan = datasets.read_plan(dataset)
    if wrong[0].startswith("dataset.json has been changed"):
        return "Put back the one that was there."
    belongs = datasets.location(".", recipe=plan.recipe, split=plan.split, simulation=plan.simulation)
    if dataset.rsplit("/", 1)[-1] != belongs.rsplit("/", 1)[-1]:
        return f"It was called {belongs.rsplit('/', 1)[-1]}; with that name `raylens simulate` mends it."
    if wrong[0].endswith("is not in the manifest"):
        return "Move what does not belong there away."
    return f"`{datasets.command(dataset)}` mends it."


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(metavar="DATASET|RUN", help="a dataset, or the run of a network", show_default=False)
    ],
    to: Annotated[
        str, typer.Option("--to", help="the file: .fits for images, .onnx for a network", show_default=False)
    ],
    index: Annotated[
        str | None,
        typer.Option(
            "--index",
            metavar="A:B",
            help="which images: from A up to but not with B; A:, :B, or A alone",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write images of a dataset to a FITS file, with coordinates and the truth, or a network to an ONNX file."""
    if to.endswith(".onnx"):
        if index is not None:
            raise typer.BadParameter("--index is for images; a network is exported as a whole.")
        from raylens import onnx_model

        _finish(**asdict(onnx_model.export(source, to)))
        return
    if index is None:
        raise typer.BadParameter("images need --index A:B, which says which; a network goes to a file ending in .onnx.")
    from raylens import export as exports

    _finish(**asdict(exports.export(source, to, index=index)))


@app.command()
def train(
    network: Annotated[str, typer.Argument(help="n-cnn or alpha-cnn", show_default=False)],
    data: Data,
    to: To,
    validation: Annotated[
        str | None, typer.Option(help="the dataset to validate on; a held-out tenth", show_default=False)
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="whose settings; the dataset's recipe, if that has a name", show_default=False)
    ] = None,
    settings: Set = None,
    num_workers: Annotated[
        str, typer.Option(metavar="K|MIN:MAX", help="how many train together, or at least and at most")
    ] = "1",
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that stands")] = False,
) -> None:
    """Train one of the two networks on a dataset."""
    if network not in ("n-cnn", "alpha-cnn"):
        raise typer.BadParameter(f"there is no network {network}; the networks are n-cnn and alpha-cnn.")
    workers = _workers(num_workers)
    from raylens import dataset as datasets

    if not recipe:
        datasets.read_plan(storage.absolute(data))  # or the error would be about recipes
    experiment = recipes.load_with_networks(recipe or data)
    chosen = experiment.n_cnn if network == "n-cnn" else experiment.alpha_cnn
    changes = _changes(settings)
    for key in changes:
        check_key(NetworkSettings, key)
    chosen = chosen.override(changes)
    from raylens import train as training

    meter = _Epochs(network, chosen.training.num_epochs)
    trained = training.train(
        network,  # type: ignore[arg-type]
        chosen,
        to,
        data=datasets.Dataset.open(data),
        validation=datasets.Dataset.open(validation) if validation else None,
        recipe=experiment.name,
        num_workers=workers,
        resume=resume,
        progress=meter,
    )
    _finish(**asdict(trained))


@app.command()
def tune(
    space: Annotated[str, typer.Argument(help="a search space's name, or a .toml or .json file", show_default=False)],
    data: Annotated[str | None, typer.Option("--data", help="the dataset to search on", show_default=False)] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="the campaign: a local path or s3://bucket/prefix", show_default=False)
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="the dataset to validate on; a held-out tenth", show_default=False)
    ] = None,
    searcher: Annotated[str, typer.Option(help="grid, random, asha, optuna or pbt")] = "asha",
    num_trials: Annotated[
        int | None, typer.Option(min=1, help="how many trials; 32, and of the grid all", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a campaign that stands")] = False,
    print_space: Annotated[
        bool, typer.Option("--print-space", help="print the space, as a file to start from")
    ] = False,
) -> None:
    """Search for the best network of a space."""
    from raylens import search as searches

    search = searches.load(space)
    if print_space:
        print(json.dumps(search.as_dict(), indent=2 if _Talk.out.isatty() else None), file=_Talk.out)
        return
    if searcher not in get_args(searches.Searcher):
        raise typer.BadParameter(
            f"there is no searcher {searcher}; the searchers are {', '.join(get_args(searches.Searcher))}."
        )
    if data is None or to is None:
        raise typer.BadParameter("a search needs --data DATASET and --to CAMPAIGN.")
    from raylens import dataset as datasets
    from raylens import tune as tuning

    with _Leaderboard() as leaderboard:
        tuned = tuning.tune(
            search,
            to,
            data=datasets.Dataset.open(data),
            validation=datasets.Dataset.open(validation) if validation else None,
            searcher=searcher,  # type: ignore[arg-type]
            num_trials=num_trials,
            resume=resume,
            progress=leaderboard,
        )
    _say(f"the best network, at full length: {tuned.command}")
    _finish(**asdict(tuned))


@app.command()
def predict(
    n_cnn: NCNN,
    alpha_cnn: AlphaCNN,
    images: Annotated[
        str,
        typer.Option("--images", help="a dataset, or a file or folder of FITS, .npy or Parquet", show_default=False),
    ],
    to: Annotated[str, typer.Option("--to", help="the predictions, a .parquet file", show_default=False)],
) -> None:
    """Predict N and alpha of any images with two trained networks; those that cannot be are skipped, and said."""
    from raylens import predict as prediction

    predicted = prediction.predict(images, to, n_cnn=n_cnn, alpha_cnn=alpha_cnn, progress=_Meter("predict", "files"))
    for image in predicted.skipped:
        _say(f"skipped: number {image['number']} in {image['file']}: {image['reason']}")
    if predicted.num_skipped > len(predicted.skipped):
        _say(f"and {predicted.num_skipped - len(predicted.skipped):,} more; the column `skipped` says which and why")
    if predicted.num_ignored:
        _say(f"{predicted.num_ignored:,} other files are left aside")
    if predicted.num_without_pixel_scale:
        _say(f"{predicted.num_without_pixel_scale:,} images state no pixel scale, and are taken at the networks'")
    _finish(**asdict(predicted))


@app.command()
def evaluate(
    n_cnn: NCNN,
    alpha_cnn: AlphaCNN,
    data: Annotated[
        list[str], typer.Option("--data", help="a dataset to test on; may be repeated", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", help="the results, a .json file", show_default=False)],
    true_n: Annotated[bool, typer.Option("--true-n", help="also give the alpha-CNN the true N (table 4)")] = False,
) -> None:
    """Test two trained networks as section 3 of the paper does."""
    storage.check_writable(storage.absolute(to).rpartition("/")[0])
    from raylens import evaluate as evaluation
    from raylens.dataset import Dataset

    test_sets = [Dataset.open(uri) for uri in data]
    results = evaluation.evaluate(
        test_sets, n_cnn=n_cnn, alpha_cnn=alpha_cnn, true_n=true_n, progress=_Meter("evaluate", "images")
    )
    storage.write(to, json.dumps(results) + "\n")
    num_images = sum(entry["num_images"] for entry in results["datasets"])
    _finish(
        results=storage.absolute(to), metrics=evaluation.headline(results), num_images=num_images, **results["cost"]
    )


@app.command()
def report(
    results: Annotated[
        list[str], typer.Argument(help="one results.json or more, or a campaign.json", show_default=False)
    ],
    to: Annotated[str, typer.Option("--to", help="the page, a .html file", show_default=False)],
) -> None:
    """Put results beside the paper's, or what a campaign found, on one self-contained HTML page."""
    started = time.perf_counter()
    contents = [storage.read_json(uri) for uri in results]
    if len(contents) == 1 and "search" in contents[0]:
        from raylens import findings

        try:
            record = Campaign.parse(contents[0])
        except ValueError as error:
            raise ValueError(f"{results[0]} does not describe a campaign: {error}") from None
        storage.write(to, findings.findings(record))
    else:
        from raylens import report as reports

        storage.write(to, reports.report(contents))
    _finish(report=storage.absolute(to), seconds=time.perf_counter() - started)


@app.command()
def reproduce(
    recipe: Annotated[
        list[str],
        typer.Argument(help="a recipe's name, a .toml or .json file, or a dataset; or several", show_default=False),
    ],
    to: To,
) -> None:
    """Do all of it: simulate, train both networks, evaluate, report; what stands is skipped.

    Several experiments each have a folder of their name below --to.
    """
    experiments = [recipes.load_with_networks(one) for one in recipe]
    from raylens import reproduce as reproduction

    def begin(experiment: Experiment, stage: str) -> _Meter | _Epochs:
        if len(experiments) > 1 and stage == "simulate train":
            _say(experiment.name)
        if stage.startswith("train"):
            network = experiment.n_cnn if stage.endswith(" n-cnn") else experiment.alpha_cnn
            return _Epochs(stage.removeprefix("train "), network.training.num_epochs)
        return _Meter(stage, "images")

    if len(experiments) == 1:
        facts = reproduction.reproduce(experiments[0], to, begin=begin)
        told = {"": facts["metrics"]}
    else:
        facts = reproduction.reproduce_all(experiments, to, begin=begin)
        told = facts["metrics"]
    for experiment, metrics in told.items():
        for name, value in metrics.items():
            _say(f"{' '.join(filter(None, (experiment, name))):15} {_number(value, '.4g')}")
    _say(f"report          {facts['report']}")
    _finish(**facts)


@app.command()
def doctor(
    place: Annotated[
        str | None, typer.Argument(help="a local path or s3://bucket/prefix to try to write", show_default=False)
    ] = None,
) -> int:
    """Say what this machine and this cluster can do, and whether a place can be written."""
    from raylens import doctor as practice

    findings = practice.examine(place)
    for finding in findings:
        _say(f"{'ok ' if finding.fine else 'BAD'}  {finding.name:15}{finding.detail}")
    _finish(**{finding.name: {"fine": finding.fine, "detail": finding.detail} for finding in findings})
    bad = [finding for finding in findings if not finding.fine]
    return _fail(f"{bad[0].name}: {bad[0].detail}") if bad else 0


class _Talk:
    """How much is said, and where."""

    quiet = False
    debug = False
    out: TextIO = sys.stdout


class _Meter:
    """Tells of a stage's progress on standard error: how far, how fast of late, how long still.

    On a terminal one line changes; in a log lines follow each other, the more slowly the longer it takes.
    """

    def __init__(self, stage: str, unit: str) -> None:
        self.stage, self.unit = stage, unit
        self.begun = self.told = time.perf_counter()
        self.lately: deque[tuple[float, int]] = deque(maxlen=50)  # when how much was done
        self.live = sys.stderr.isatty()

    def __call__(self, done: int, total: int, detail: str = "") -> None:
        now = time.perf_counter()
        self.lately.append((now, done))
        pause = 0.2 if self.live else min(2 + (now - self.begun) / 20, 60)
        if _Talk.quiet or (now - self.told < pause and done < total):
            return
        self.told = now
        # At the first word, and of the whole in the end, what counts is the time since the beginning.
        since, before = self.lately[0] if len(self.lately) > 1 and done < total else (self.begun, 0)
        rate = (done - before) / (now - since)
        left = f"{_duration((total - done) / rate)} left" if done < total and rate else f"in {_duration(now - since)}"
        digits = 0 if rate >= 10 else 2  # files may take seconds each
        line = f"{self.stage:24} {done:9,} of {total:,} {self.unit}  {detail}  {rate:9,.{digits}f}/s  {left}"
        end = "\n" if done == total or not self.live else ""
        print(f"\r\x1b[K{line}" if self.live else line, end=end, file=sys.stderr, flush=True)


class _Epochs:
    """Tells of a training on standard error: a table that grows by a line with each epoch."""

    _COLUMNS = ("loss", "validation", "RMSE", "gradient", "bias", "images/s", "waiting")

    def __init__(self, network: str, num_epochs: int) -> None:
        self.network, self.num_epochs = network, num_epochs
        self.begun = False

    def __call__(self, record: dict[str, Any]) -> None:
        if _Talk.quiet:
            return
        epoch = f"{record['epoch']} of {self.num_epochs}"
        if not self.begun:
            self.begun = True
            first = f"; first batch after {_duration(record['elapsed'] - record['seconds'])}"
            print(
                f"{self.network:10} workers: {record['num_workers']}, threads of each: {record['num_threads']}, "
                f"images: {record['share']}{first if record['epoch'] == 1 else ''}\n"
                f"{'':10} {'epoch':>11} {' '.join(f'{name:>10}' for name in self._COLUMNS)}  time left",
                file=sys.stderr,
            )
        values = (
            f"{record['train_loss']:.4f}",
            f"{record['validation_loss']:.4f}",
            f"{record['validation_rmse']:.4g}",
            _number(record["validation_gradient"], ".3f"),
            f"{record['validation_bias']:+.3g}",
            f"{record['images_per_second']:,.0f}",
            f"{record['waiting']:.1%}",
        )
        left = _duration(record["seconds"] * (self.num_epochs - record["epoch"]))
        told = " ".join(f"{value:>10}" for value in values)
        print(f"{self.network:10} {epoch:>11} {told}  {left}", file=sys.stderr, flush=True)


class _Leaderboard:
    """Tells of a campaign on standard error: on a terminal its best trials, in a log a line for each that ends."""

    def __init__(self) -> None:
        self.num_told = 0
        self.live = Live(console=Console(stderr=True)) if sys.stderr.isatty() and not _Talk.quiet else None

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, campaign: Campaign) -> None:
        num_ended = sum(trial.status != "running" for trial in campaign.trials)
        busy = f"{campaign.busy:.0%} of the time of {campaign.num_slots} slots spent in trials"
        counted = f"{num_ended} of {campaign.num_trials} trials"
        far = f"{campaign.search.name}  {counted}  {_duration(campaign.seconds)}  {busy}"
        if self.live:
            self.live.update(self.table(campaign, far))
        elif num_ended > self.num_told and not _Talk.quiet:
            self.num_told = num_ended
            best = campaign.best
            found = f"best {campaign.search.metric} {best.metric:.4g}, trial {best.id}" if best else "no epoch yet"
            print(f"{far}  {found}", file=sys.stderr, flush=True)

    def table(self, campaign: Campaign, title: str) -> Table:
        """Return the best trials and those that have only begun, in 80 columns for the paper's spaces."""
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        shown = {trial.id: spelled_out(campaign.search, trial.config) for trial in campaign.trials}
        names = dict.fromkeys(name for settings in shown.values() for name in settings)
        for name in ("trial", *names, "status", "epochs", campaign.search.metric):
            table.add_column(name.replace("_", "\n"), overflow="fold")
        running = [trial for trial in campaign.trials if trial.status == "running"]
        for trial in [*campaign.ranked()[:10], *(trial for trial in running if trial.metric is None)]:
            metric = _number(trial.metric, ".4g")
            table.add_row(trial.id, *map(str, shown[trial.id].values()), trial.status, str(trial.epochs), metric)
        return table


def _workers(text: str) -> int | tuple[int, int]:
    """Return K, or MIN:MAX as a pair."""
    counted = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", text)
    if not counted or (counted[2] and int(counted[2]) < int(counted[1])):
        raise typer.BadParameter(f"--num-workers takes K, or MIN:MAX with MIN not above MAX; got {text}.")
    return (int(counted[1]), int(counted[2])) if counted[2] else int(counted[1])


def _changes(settings: list[str] | None) -> dict[str, Any]:
    """Return --set KEY=VALUE as a dictionary; a value is JSON, or else a word."""
    changes = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals:
            raise typer.BadParameter(f"--set takes KEY=VALUE; got {setting}.")
        try:
            changes[key] = json.loads(text)
        except ValueError:
            changes[key] = text
    return changes


def _number(value: float | None, digits: str) -> str:
    """Return a number as people read it; a dash for what is not defined, as a gradient where the truth is held."""
    return "-" if value is None else format(value, digits)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _say(line: str) -> None:
    if not _Talk.quiet:
        print(line, file=_Talk.out)


def _finish(**facts: Any) -> None:
    print(json.dumps(facts), file=_Talk.out, flush=True)


def _fail(message: str, status: int = 1) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


def _sentence(text: str) -> str:
    return " ".join(text.split()).removesuffix(".") + "."


def _explanation(error: BaseException) -> str:
    """Return one line for an error: the first of its causes that speaks to a person."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        # What fails in a worker or in what directs them arrives wrapped, and says under one of these what it was.
        failures = [*getattr(link, "worker_failures", {}).values(), getattr(link, "controller_failure", None)]
        link = failures[0] or getattr(link, "cause", None) or link.__cause__
    for link in chain:
        # What wraps another may be of that one's type too, but its text is a traceback.
        wraps = any(hasattr(link, name) for name in ("cause", "worker_failures", "controller_failure"))
        if isinstance(link, (ValueError, OSError, MemoryError)) and str(link) and not wraps:
            text, _, _ = str(link).partition("\nFailed to apply UDF transform")  # Ray Data's advice on retries
            return " ".join(text.split())
    # Of what fails in a task of Ray Data only the text arrives, with the traceback; the last in it was raised last.
    kinds = r"raylens\.storage\.StorageError|ValueError|MemoryError|OSError"
    told = re.findall(rf"^(?:{kinds}): (.+)$", str(error), re.MULTILINE)
    if told:
        return told[-1]
    first = str(chain[-1]).strip().splitlines()
    return f"{type(chain[-1]).__name__}: {first[0] if first else 'no message'} (--debug shows where)"
