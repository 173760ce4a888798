"""The main job: simulate, train both networks, evaluate, report, each stage skipped when its output stands.

Below the root of an experiment lie the datasets, the runs (named, like the datasets, by what made them),
`results.json`, `report.html`, and `stages.json`, which remembers what each stage cost. Several experiments
have a root each below a common one, by their names, and there a report on all of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from raylens import cluster, dataset, evaluate, generate, models, report, storage, train
from raylens.config import SPLITS, Experiment, Network, digest
from raylens.dataset import Dataset
from raylens.simulate import require_drawable

# Told of each stage: the experiment, its name, and the progress within it as the stage reports it.
Begin = Callable[[Experiment, str], Callable[..., None]]


def reproduce_all(experiments: list[Experiment], root: str, *, begin: Begin) -> dict[str, Any]:
    """Run several experiments below a root, or what is missing of them; return where all is and the cost.

    Raises
    ------
    ValueError
        If two have one name, or one of them cannot be drawn.
    """
    root = storage.absolute(root)
    names = [experiment.name for experiment in experiments]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"each experiment needs a name of its own, as a folder below {root}; {twice} is there twice.")
    for experiment in experiments:
        _require_drawable(experiment)
    reproduced = [reproduce(experiment, storage.join(root, experiment.name), begin=begin) for experiment in experiments]
    page = storage.join(root, "report.html")
    storage.write(page, report.report([json.loads(storage.read(facts["results"])) for facts in reproduced]))
    summed = ("seconds", "cpu_seconds", "gpu_seconds")
    return {
        "experiments": dict(zip(names, reproduced, strict=True)),
        "report": page,
        "metrics": {name: facts["metrics"] for name, facts in zip(names, reproduced, strict=True)},
        **{key: sum(facts[key] for facts in reproduced) for key in summed},
    }


def reproduce(
    experiment: Experiment, root: str, *, begin: Begin = lambda experiment, stage: lambda *facts: None
) -> dict[str, Any]:
    """Run an experiment below a root, or what is missing of it; return where all is, the metrics and the cost."""
    started = time.perf_counter()
    root = storage.absolute(root)
    _require_drawable(experiment)
    stages = _Stages(root)
    datasets: dict[str, Dataset] = {}
    num_made = 0.0
    for split in SPLITS:
        stage = f"simulate {split}"
        simulated = generate.simulate(
            experiment.simulation,
            root,
            recipe=experiment.name,
            split=split,
            num_images=experiment.num_images.of(split),
            progress=begin(experiment, stage),
        )
        # More may stand; the experiment is on as many as it says.
        datasets[split] = Dataset.open(simulated.dataset, experiment.num_images.of(split))
        num_made += simulated.images_per_second * simulated.seconds
        if simulated.num_made:
            stages.add(stage, asdict(simulated))

    networks: dict[models.NetworkName, Network] = {"n-cnn": experiment.n_cnn, "alpha-cnn": experiment.alpha_cnn}
    runs = {
        name: _trained(name, network, experiment, root, datasets, stages, begin) for name, network in networks.items()
    }
    place = storage.join(root, "results.json")
    tests = [data for split, data in datasets.items() if split.startswith("test")]
    results = _standing_results(place, experiment, tests, runs)
    if results is None:
        results = evaluate.evaluate(
            tests, n_cnn=runs["n-cnn"], alpha_cnn=runs["alpha-cnn"], true_n=True, progress=begin(experiment, "evaluate")
        )
        stages.add("evaluate", results["cost"])
    results |= {
        "experiment": experiment.as_dict(),
        "stages": stages.records,
        "machine": {**asdict(cluster.connect()), "processor": ", ".join(_processors(datasets["train"]))},
    }
    storage.write(place, json.dumps(results) + "\n")
    page = storage.join(root, "report.html")
    storage.write(page, report.report([results]))
    seconds = time.perf_counter() - started
    return {
        "recipe": experiment.name,
        "digest": experiment.simulation.digest,
        "datasets": {split: data.uri for split, data in datasets.items()},
        "runs": runs,
        "results": place,
        "report": page,
        "metrics": evaluate.headline(results),
        "seconds": seconds,
        **stages.spent,
        "images_per_second": num_made / seconds,  # simulated, in all this time
    }


def _processors(data: Dataset) -> list[str]:
    """Return the kinds of processors that simulated a dataset."""
    manifest = dataset.read_manifest(data.uri)
    assert manifest is not None  # it was opened
    return manifest.processors


def _require_drawable(experiment: Experiment) -> None:
    for split in SPLITS:  # all of them, before hours go into the first
        require_drawable(experiment.simulation, split)


def _trained(
    name: models.NetworkName,
    network: Network,
    experiment: Experiment,
    root: str,
    datasets: dict[str, Dataset],
    stages: _Stages,
    begin: Begin,
) -> str:
    """Return the run of a trained network, training it or going on where that stopped."""
    made_of = {
        "network": network.as_dict(),
        "simulation": experiment.simulation.digest,
        "num_images": experiment.num_images.as_dict(),
    }
    run = storage.join(root, f"{experiment.name}-{name}-{digest(made_of)}")
    if not storage.exists(storage.join(run, "model.json")):
        trained = train.train(
            name,
            network,
            run,
            data=datasets["train"],
            validation=datasets["validation"],
            recipe=experiment.name,
            resume=True,
            progress=begin(experiment, f"train {name}"),
        )
        card = models.read_card(run, name)
        whole = {"images_per_second": card.metrics["images_per_second"], **card.as_dict()}
        stages.add(f"train {name}", asdict(trained), whole)
    return run


def _standing_results(
    place: str, experiment: Experiment, tests: list[Dataset], runs: dict[models.NetworkName, str]
) -> dict[str, Any] | None:
    """Return the results that stand, if they are of these runs and test sets, by this version."""
    if not storage.exists(place):
        return None
    results = json.loads(storage.read(place))
    if results.get("experiment") != experiment.as_dict() or results["versions"] != dataset.versions():
        return None
    evaluated = {
        name: {key: value for key, value in results[name.replace("-", "_")].items() if key not in ("run", "history")}
        for name in runs
    }
    standing = {name: models.read_card(run, name).as_dict() for name, run in runs.items()}
    tested = [(entry["dataset"], entry["digest"], entry["num_images"]) for entry in results["datasets"]]
    opened = [(data.uri, data.plan.digest, data.num_images) for data in tests]
    return results if evaluated == standing and tested == opened else None


class _Stages:
    """What each stage cost: when it last did any work, or in all calls, where that is known."""

    def __init__(self, root: str) -> None:
        self._place = storage.join(root, "stages.json")
        self.spent = {"cpu_seconds": 0.0, "gpu_seconds": 0.0}  # in this call
        self.records: list[dict[str, Any]] = []
        if storage.exists(self._place):
            self.records = json.loads(storage.read(self._place))

    def add(self, stage: str, spent: dict[str, Any], whole: dict[str, Any] | None = None) -> None:
        """Note what a stage cost in this call, and, if that is known, in all calls."""
        for key in self.spent:
            self.spent[key] += spent.get(key, 0.0)
        facts = whole or spent
        self.records = [record for record in self.records if record["stage"] != stage]
        costs = ("seconds", "cpu_seconds", "gpu_seconds", "images_per_second")
        self.records.append({"stage": stage, **{key: facts[key] for key in costs if key in facts}})
        storage.write(self._place, json.dumps(self.records, indent=1) + "\n")
