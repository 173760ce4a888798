"""Many trainings search for the best network, with Ray Tune: trials, who stops them, what is known of them.

The images are read once and lie in each node's shared memory, where the trials on it read them in place. The record of
a campaign is its own (`campaign`), and Ray's is thrown away: a campaign that goes on tells the searcher and the
scheduler what is known of the trials that have ended, and takes those that had not up at their last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import ray.tune
import torch
from ray.air.execution._internal import actor_manager
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.tune.execution import tune_controller
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from raylens import campaign as campaigns
from raylens import cluster, learning, models, shards, share, storage, train
from raylens import search as searches
from raylens.board import CampaignBoard
from raylens.campaign import Campaign, Tried
from raylens.config import Network, Search
from raylens.dataset import Dataset
from raylens.findings import findings
from raylens.learning import Block
from raylens.search import Searcher
from raylens.trial import CHECKPOINT, Trial

Progress = Callable[[Campaign], None]  # told whenever something is new

_DEFAULT_NUM_TRIALS = 32
_SHARE_OF_OBJECT_STORE = 0.8  # for the images
_REDUCTION = 4  # of the trials that come to a rung of successive halving one in so many goes on
_MUTATED = ("learning_rate", "batch_size", "dropout")  # what a training may change on its way
_EPOCHS_BETWEEN_MUTATIONS = 2
_NEVER = 1e30  # a metric that ranks after all others, and can be interpolated
_MAX_FAILURES = 2  # of a trial's process or node; what fails by itself fails again


@dataclass(frozen=True)
class Tuned:
    """What a call of `tune` found, and what that cost."""

    campaign: str  # URI
    best: dict[str, Any]  # the trial
    num_trials: int
    num_failed: int
    reference_rank: int | None  # of the recipe's own settings, from 1
    recipe: str  # URI of a recipe file with the best network
    report: str  # URI of a page on what was found
    command: str  # that trains it at full length
    seconds: float
    cpu_seconds: float
    gpu_seconds: float
    num_slots: int  # trials at once
    busy: float  # seconds in trials over slots times seconds


def tune(
    search: Search,
    campaign: str,
    *,
    data: Dataset,
    validation: Dataset | None = None,
    searcher: Searcher = "asha",
    num_trials: int | None = None,
    resume: bool = False,
    progress: Progress = lambda record: None,
) -> Tuned:
    """Try networks of a search space on a dataset, and keep what is known of each.

    Parameters
    ----------
    num_trials
        How many trials the campaign ends with: at most as many as there are configurations. Without it the grid tries
        all of them, and a campaign that goes on as many as it was begun with.

    Raises
    ------
    ValueError
        If nothing in the space can be tried, the campaign stands and is not to be resumed or was begun otherwise, the
        cluster has no room for a trial, its machines do not share the campaign's folder, an image is not finite, or
        no trial came to the end of an epoch.
    """
    started = time.time()
    campaign = storage.absolute(campaign)
    if validation:
        train.require_same_simulation(data, validation)
    base = searches.base_network(search)
    scheduler = _scheduler(searcher, search)
    possible, left_out = searches.configurations(search, base, num_pixels=data.num_pixels)
    most = num_trials or (len(possible) if searcher == "grid" else _DEFAULT_NUM_TRIALS)
    if not resume and storage.names(campaign):
        raise ValueError(f"{campaign} stands already; go on with --resume, or choose another --to.")
    held_out = np.zeros(data.num_images, bool)
    if validation is None:
        held_out = train.held_out_rows(data.num_images, base.training.seed)
    card = train.untrained(search.network, base, held_out, data, validation, search.recipe, 1)
    record = Campaign(
        search=search,
        searcher=searcher,
        base=base,
        num_trials=min(most, len(possible)),
        dataset=data.uri,
        dataset_digest=data.plan.digest,
        validation_dataset=card.validation_dataset,
        num_pixels=data.num_pixels,
        num_training_images=card.num_training_images,
        num_validation_images=card.num_validation_images,
        num_possible=len(possible),
        left_out=left_out,
        reference=searches.configuration_of(search, base, possible),
        versions=card.versions,
    )
    record = _begun(campaign, record, longer=num_trials is not None)
    storage.check_writable(campaign)
    cluster.connect()
    cluster.require_shared(campaign)
    slots = _require_room(data, validation, search)
    campaigns.write(campaign, record)

    proposals = searches.proposals(searcher, search, possible, record.reference)
    watch = _Watch(campaign, record, proposals, progress, slots, started)
    watch.take_up(scheduler)
    if watch.num_open:
        reading: Any = _read.remote(data.parts, validation.parts if validation else None, held_out, card.target)
        images, read = reading
        ray.get(read)  # raises what is wrong with them
        _run(watch, scheduler, card=card, images=images)
        watch.finish()
    return _finish(watch, data)


def _begun(campaign: str, record: Campaign, *, longer: bool) -> Campaign:
    """Return the record of a campaign that stands, made longer if that is asked for, or the new one."""
    standing = campaigns.read(campaign)
    if standing is None:
        return record
    same = ("search", "searcher", "base", "dataset_digest", "num_training_images", "num_validation_images")
    there, here = ({key: one.as_dict()[key] for key in same} for one in (standing, record))
    if there != here:
        raise ValueError(
            f"{campaign} was begun otherwise: {shards.difference(there, here)}. "
            "Go on as it was begun, or choose another --to."
        )
    return standing.override({"num_trials": max(record.num_trials, len(standing.trials))}) if longer else standing


@dataclass(frozen=True)
class _Slots:
    """How many trials run at once, and what each of them holds."""

    num: int
    resources: dict[str, float]


def _require_room(data: Dataset, validation: Dataset | None, search: Search) -> _Slots:
    """Return what the cluster has for trials; refuse one that has nothing for a single trial."""
    cluster.require_nodes_for_work()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    num_images = data.num_images + (validation.num_images if validation else 0)
    needed = 4 * data.num_pixels**2 * num_images
    room = min(node.get("object_store_memory", 0) for node in nodes)
    if needed > _SHARE_OF_OBJECT_STORE * room:
        raise ValueError(
            f"the images of {data.uri} take {needed / 1e9:,.1f} GB of the shared memory of a node, and "
            f"{_SHARE_OF_OBJECT_STORE:.0%} of the smallest one's is {_SHARE_OF_OBJECT_STORE * room / 1e9:,.1f} GB; "
            "search on fewer images, or on nodes with more memory."
        )
    return _slots(nodes, search.trials_per_gpu)


def _slots(nodes: list[dict[str, float]], trials_per_gpu: int) -> _Slots:
    """Return the slots of nodes that hold so much; where there are GPUs, only their nodes have any."""
    if with_gpu := [node for node in nodes if node.get("GPU", 0) >= 1]:
        num_cpus = min(node["CPU"] / (int(node["GPU"]) * trials_per_gpu) for node in with_gpu)
        num_slots = sum(int(node["GPU"]) for node in with_gpu) * trials_per_gpu
        return _Slots(num_slots, {"CPU": min(1.0, num_cpus), "GPU": 1 / trials_per_gpu})
    return _Slots(sum(int(node["CPU"]) for node in nodes), {"CPU": 1.0})


@ray.remote(num_returns=2)
def _read(
    parts: list[tuple[str, int]],
    validation: list[tuple[str, int]] | None,
    held_out: np.ndarray,
    target: str,
) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], None]:
    """Return the columns of all rows to train and to validate on, and that they are read.

    Ray keeps the columns where processes read them in place, and nobody fetches them to see whether there are any.
    """

    def columns(parts: list[tuple[str, int]], used: np.ndarray) -> list[np.ndarray]:
        block = share.read(share.parts_of(parts, used, rank=0, world_size=1), target, torch.device("cpu"))
        assert block is not None
        return [column.numpy() for column in block]

    if validation is None:
        return (columns(parts, ~held_out), columns(parts, held_out)), None
    others = columns(validation, np.ones(sum(rows for _, rows in validation), bool))
    return (columns(parts, ~held_out), others), None


def _scheduler(searcher: Searcher, search: Search) -> TrialScheduler:
    least, most = search.epochs
    if searcher in ("asha", "optuna"):
        return ASHAScheduler(
            time_attr="epoch", metric="metric", mode="min", grace_period=least, max_t=most, reduction_factor=_REDUCTION
        )
    if searcher == "pbt":
        mutations = {name: list(search.values[name]) for name in _MUTATED if name in search.values}
        if not mutations:
            raise ValueError(
                f"pbt changes {', '.join(_MUTATED)} on the way, and the space searches none of them; "
                "name values for one, or choose another --searcher."
            )
        random.seed(search.seed)  # which Ray draws from
        return PopulationBasedTraining(
            time_attr="epoch",
            metric="metric",
            mode="min",
            perturbation_interval=_EPOCHS_BETWEEN_MUTATIONS,
            burn_in_period=least,
            hyperparam_mutations={"trial": {"config": mutations}},
        )
    return FIFOScheduler()


def _run(watch: _Watch, scheduler: TrialScheduler, *, card: models.Card, images: Any) -> None:
    # Ours are TensorBoard and the record; and Ctrl-C ends a campaign at once, which goes on with --resume.
    os.environ.update(TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", TUNE_DISABLE_SIGINT_HANDLER="1", RAY_AIR_NEW_OUTPUT="0")
    _survive_lack_of_memory()
    file_system, path = storage.arrow_file_system(watch.campaign)
    scratch = f"{path}/ray"
    _remove_folder(file_system, scratch)
    # A population is there from the beginning and is trained by turns; other trials are proposed when there is room.
    turns = isinstance(scheduler, PopulationBasedTraining)
    population = ray.tune.grid_search([watch.begin() for _ in range(watch.num_open)]) if turns else None
    trainable = ray.tune.with_parameters(
        _Trainable, campaign=watch.campaign, search=watch.record.search, card=card, images={"ref": images}
    )
    ray.tune.Tuner(
        ray.tune.with_resources(trainable, watch.slots.resources),
        param_space={"trial": population} if turns else None,
        tune_config=ray.tune.TuneConfig(
            search_alg=None if turns else _Proposer(watch),
            scheduler=scheduler,
            num_samples=1 if turns else watch.num_open,
            max_concurrent_trials=None if turns else watch.slots.num,
            reuse_actors=True,
            trial_name_creator=lambda trial: trial.config["trial"]["id"],
            trial_dirname_creator=lambda trial: trial.config["trial"]["id"],
        ),
        run_config=ray.tune.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=file_system,
            verbose=0,
            callbacks=[watch],
            failure_config=ray.tune.FailureConfig(max_failures=_MAX_FAILURES),
        ),
    ).fit()
    _remove_folder(file_system, scratch)


def _survive_lack_of_memory() -> None:
    """Let a process that Ray ends for memory end its trial and not the campaign.

    Ray's controller takes a RayActorError alone for the death of a process, and this one is an OutOfMemoryError (2.60).
    """
    for module in (actor_manager, tune_controller):
        vars(module)["RayActorError"] = (RayActorError, OutOfMemoryError)


def _remove_folder(file_system: Any, path: str) -> None:
    if file_system.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        file_system.delete_dir(path)


def _finish(watch: _Watch, data: Dataset) -> Tuned:
    campaign, record = watch.campaign, watch.record
    failed = [trial for trial in record.trials if trial.status == "failed"]
    if record.best is None:
        raise ValueError(f"no trial of {campaign} came to the end of an epoch; the first: {failed[0].reason}")
    recipe = storage.join(campaign, "winner.json")
    winner = campaigns.winning_recipe(record, data.plan.simulation, data.plan.recipe)
    storage.write(recipe, json.dumps(winner, indent=1) + "\n")
    validated = f" --validation {record.validation_dataset}" if record.validation_dataset else ""
    report = storage.join(campaign, "report.html")
    storage.write(report, findings(record))
    return Tuned(
        campaign=campaign,
        best=record.best.as_dict(),
        num_trials=len(record.trials),
        num_failed=len(failed),
        reference_rank=record.reference_rank(),
        recipe=recipe,
        report=report,
        command=f"raylens train {record.search.network} --data {data.uri}{validated} --recipe {recipe} --to RUN",
        seconds=record.seconds - watch.before[0],
        cpu_seconds=watch.trained * watch.slots.resources["CPU"],
        gpu_seconds=watch.trained * watch.slots.resources.get("GPU", 0.0),
        num_slots=watch.slots.num,
        busy=record.busy,
    )


class _Trainable(ray.tune.Trainable):
    """A trial, as Ray Tune drives it: an epoch a step."""

    def setup(  # type: ignore[override]
        self, config: dict[str, Any], *, campaign: str, search: Search, card: models.Card, images: Any
    ) -> None:
        learning.compute_with(1)  # a trial has one core, and on a GPU needs no more
        self.about, self.search = (campaign, card), search
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with warnings.catch_warnings():
            # They are read in place, and nobody writes to them.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.blocks = [
                Block(*(torch.from_numpy(column).to(device) for column in columns))
                for columns in ray.get(images["ref"])
            ]
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, in a process that has imported all and has the images at hand."""
        self._begin(new_config)
        return True

    def _begin(self, config: dict[str, Any]) -> None:
        campaign, card = self.about
        self.fault: str | None = None
        self.num_told = 0  # of the epochs that stood when it was begun
        try:
            base = Network(model=card.model, training=card.training)
            network = searches.network_of(self.search, base, config["trial"]["config"])
            own = models.Card.parse(card.as_dict() | network.as_dict())
            self.trial = Trial(campaigns.folder(campaign, self.trial_name), own, *self.blocks)
        except Exception as error:
            self.fault = _explanation(error)

    def step(self) -> dict[str, Any]:
        """Return the next epoch, which may stand already, or why there is none."""
        new = False
        if self.fault is None:
            try:
                if self.num_told == len(self.trial.history):
                    self.trial.train_epoch()
                    new = True
            except Exception as error:
                self.fault = _explanation(error)
        if self.fault is not None:
            return {"metric": _NEVER, "epoch": self.num_told + 1, "failed": self.fault, "done": True}
        self.num_told += 1
        told = self.trial.history[: self.num_told]
        values = [record[self.search.metric] for record in told]
        ended = self.num_told == len(self.trial.history) and self.trial.ended
        return {
            "metric": min(values),
            "epoch": self.num_told,
            "values": values,
            "seconds": sum(record["seconds"] for record in told),
            "record": told[-1] if new else None,
            "ended": ended,
            "done": ended,
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Give another of the population what this one has learnt; one that failed has nothing to give."""
        if self.fault is not None:
            return
        with open(os.path.join(checkpoint_dir, "checkpoint.safetensors"), "wb") as file:
            file.write(self.trial.packed())

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from what another of the population has learnt, or this one before it made room for another."""
        with open(os.path.join(checkpoint, "checkpoint.safetensors"), "rb") as file:
            self.trial.restore(file.read())
        self.trial.save()  # what stands there may be of another network
        self.num_told = len(self.trial.history)


def _explanation(error: Exception) -> str:
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({os.path.basename(where.filename)}:{where.lineno})"


def _last_failure(trial: Any) -> str:
    """Return why the process of a trial failed, in a line; Ray keeps what it was told of each failure in a file."""
    with open(trial.error_file) as file:
        _, *lines = file.read().rpartition("Failure # ")[2].strip().splitlines()
    told = lines[-1 if "ray::" in lines[0] else 0]  # there a traceback begins, which ends with what was raised
    return re.sub("\x1b\\[[0-9;]*m", "", told)


class _Proposer(ray.tune.search.Searcher):
    """Gives Ray Tune the trials that had not ended, and then what is proposed."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__(metric="metric", mode="min")
        self.watch = watch

    def suggest(self, trial_id: str) -> Any:
        trial = self.watch.begin()
        return self.FINISHED if trial is None else {"trial": trial}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # the watch sees it

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass  # what Ray would keep is not read again

    def __getstate__(self) -> dict[str, Any]:
        return {}  # likewise


class _Watch(ray.tune.Callback):
    """Begins the trials, sees how they go, and keeps the record."""

    def __init__(
        self,
        campaign: str,
        record: Campaign,
        proposals: searches.Proposals,
        progress: Progress,
        slots: _Slots,
        started: float,
    ) -> None:
        self.campaign, self.record, self.proposals = campaign, record, proposals
        self.progress, self.slots, self.started = progress, slots, started
        self.before = record.seconds, record.cpu_seconds, record.gpu_seconds
        self.trials = {trial.id: trial for trial in record.trials}
        self.waiting = [trial.id for trial in record.trials if trial.status == "running"]
        self.trained = 0.0  # seconds in trials, in this call
        self.board = CampaignBoard(campaign)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray keeps a copy that nobody reads

    @property
    def num_open(self) -> int:
        """How many trials are to be run still."""
        return self.record.num_trials - len(self.trials) + len(self.waiting)

    def take_up(self, scheduler: TrialScheduler) -> None:
        """Tell what proposes and what stops trials of those that have ended."""
        for trial in self.record.trials:
            if trial.status == "running":
                self.proposals.leave(trial.config)
                continue
            values = campaigns.best_so_far(trial.values)
            self.proposals.tell(trial.config, values, trial.status)
            if isinstance(scheduler, ASHAScheduler):
                known: Any = SimpleNamespace(trial_id=trial.id)  # all that it wants to know of a trial
                controller: Any = None
                scheduler.on_trial_add(controller, known)
                for epoch, value in enumerate(values, start=1):
                    scheduler.on_trial_result(controller, known, {"epoch": epoch, "metric": value})
                scheduler.on_trial_remove(controller, known)

    def begin(self) -> dict[str, Any] | None:
        """Return the id and the configuration of the next trial, or None when there is no other."""
        if self.waiting:
            trial = self.trials[self.waiting.pop(0)]
        else:
            config = self.proposals.next()
            if config is None:
                return None
            trial = Tried(id=f"{len(self.trials):05}", config=config, status="running")
            self.trials[trial.id] = trial
            self._update()
            self._write()
        return {"id": trial.id, "config": trial.config}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        known, config = self.trials[str(trial)], dict(trial.config["trial"]["config"])
        if values := result.get("values"):
            # Of a trial that was taken up, or took over another's weights, not all epochs are its own.
            self._change(
                known,
                config=config,
                metric=min(values),
                epoch=values.index(min(values)) + 1,
                epochs=len(values),
                values=tuple(values),
                seconds=result["seconds"],
            )
            if config != known.config:
                self._write()
            if record := result["record"]:
                self.trained += record["seconds"]
                self.board.add(self.trials[known.id], record)
        if "failed" in result:
            self._change(known, status="failed", reason=result["failed"])
        self._tell()

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        known = self.trials[str(trial)]
        if known.status == "running":
            self._change(known, status="completed" if trial.last_result["ended"] else "stopped")
        self._end(known.id)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        known = self.trials[str(trial)]
        self._change(known, status="failed", reason=_last_failure(trial))
        self._end(known.id)

    def finish(self) -> None:
        """Write the record for the last time."""
        self._update()
        self._write()
        self.board.close()
        self._tell()

    def _tell(self) -> None:
        statuses = [trial.status for trial in self.trials.values()]
        cluster.publish(
            self.campaign,
            trials_planned=self.record.num_trials,
            trials_ended=len(statuses) - statuses.count("running"),
            trials_failed=statuses.count("failed"),
        )
        if self.record.best is not None and self.record.best.metric is not None:
            cluster.publish(self.campaign, best_metric=self.record.best.metric)
        self.progress(self.record)

    def _end(self, name: str) -> None:
        trial = self.trials[name]
        assert trial.status != "running"
        self.proposals.tell(trial.config, campaigns.best_so_far(trial.values), trial.status)
        self._write()
        # Nobody will go on from there.
        storage.remove(storage.join(campaigns.folder(self.campaign, name), CHECKPOINT))
        self.board.end(trial)
        self._tell()

    def _change(self, trial: Tried, **values: Any) -> None:
        self.trials[trial.id] = trial.model_copy(update=values)
        self._update()

    def _update(self) -> None:
        seconds = time.time() - self.started
        held = self.slots.resources
        record = self.record.model_copy(
            update={
                "trials": tuple(self.trials.values()),
                "seconds": self.before[0] + seconds,
                "cpu_seconds": self.before[1] + self.trained * held["CPU"],
                "gpu_seconds": self.before[2] + self.trained * held.get("GPU", 0.0),
                "busy": self.trained / (self.slots.num * seconds),
                "num_slots": self.slots.num,
            }
        )
        self.record = record.model_copy(update={"best": next(iter(record.ranked()), None)})

    def _write(self) -> None:
        campaigns.write(self.campaign, self.record)
