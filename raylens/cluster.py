"""Connects to Ray, and says what the cluster can give.

RAY_ADDRESS chooses a cluster, and RAY_AUTH_MODE must then say how it is protected. Without it a
local one is started, on loopback and behind a token of its own, and never one that happens to run
is joined.
"""

from __future__ import annotations

import logging
import math
import os
import platform
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import ray
import ray.data
import ray.util.metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylens import storage

logger = logging.getLogger(__name__)

# Workers keep the memory that they free: a step of training asks for the same hundreds of megabytes again, and to have
# them from the kernel anew, page by page, took a seventh of its time. Known to glibc alone, and ignored elsewhere.
_KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
}

_LOOPBACK = "127.0.0.1"
_SECONDS_TO_ANSWER = 120  # of a node: it starts a process and imports torch, which a slow disk makes long

SIMULATE = "raylens.simulate"  # the label of a node that says whether it simulates

# What the metrics of the cluster say of a run while it goes on, under `ray_raylens_...` and with its `place`.
METRICS = {
    "shards_planned": "shards of the dataset that is being made",
    "shards_done": "shards of it that stand",
    "images_made": "images simulated by this run",
    "images_found": "images of it that stood before",
    "epoch": "epochs trained",
    "train_images_per_second": "images trained on in a second of the last epoch, by all workers together",
    "train_waiting": "share of the last epoch in which the workers waited for images",
    "validation_loss": "of the last epoch",
    "trials_planned": "trials of the campaign",
    "trials_ended": "trials of it that have ended",
    "trials_failed": "trials of it that could not be trained",
    "best_metric": "of all epochs of all trials so far",
    "images_predicted": "images predicted by this run",
}

# Of what users of clusters mount on all nodes, as the kernel names it.
_SHARED_FILE_SYSTEMS = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "cifs", "smb3", "afs", "pvfs2", "wekafs",
    "fuse.glusterfs", "fuse.juicefs", "fuse.sshfs",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What all nodes together hold."""

    num_nodes: int
    num_cpus: int
    num_gpus: int
    memory: int  # [bytes] that Ray may give to workers


def connect() -> Resources:
    """Join the cluster at RAY_ADDRESS, or start a local one, unless that is done; return what it holds.

    Raises
    ------
    ConnectionError
        If no cluster answers at RAY_ADDRESS.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        options: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "runtime_env": {"env_vars": _KEEP_MEMORY},
        }
        try:
            if address:
                _require_answer(address)
                ray.init(address=address, **options)
            else:
                ray.init(address="local", include_dashboard=False, _node_ip_address=_LOOPBACK, **options)
                (node,) = ray.nodes()
                if node["NodeManagerAddress"] != _LOOPBACK:
                    logger.warning(
                        "Ray was imported before raylens, so it listens on all interfaces, behind its token. "
                        "Import raylens first, and it listens on loopback only."
                    )
        except ConnectionError as error:
            raise ConnectionError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
        _quieten()
    held = ray.cluster_resources()
    return Resources(
        num_nodes=sum(node["Alive"] for node in ray.nodes()),
        num_cpus=int(held.get("CPU", 0)),
        num_gpus=int(held.get("GPU", 0)),
        memory=int(held.get("memory", 0)),
    )


def _require_answer(address: str) -> None:
    """Fail where nobody listens at host:port, in seconds; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" not in host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error.strerror or str(error)) from None


def answer_to_strangers() -> int | None:
    """Return the HTTP status of the cluster's jobs for who shows no token; None where the dashboard is out of reach."""
    url = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    if not url:
        return None
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{url}/api/jobs/", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@dataclass(frozen=True)
class Node:
    """What a node says of itself."""

    address: str
    resources: dict[str, float]  # as Ray counts them
    simulates: bool
    versions: dict[str, str]  # of Python and the packages asked for
    num_gpus: int  # that torch sees
    seconds_ahead: float  # of this process's clock, or behind if negative; 0 where that cannot be told apart
    fault: str | None  # why it cannot write a place


def survey(packages: tuple[str, ...], place: str | None) -> list[Node]:
    """Ask each node what it has, and whether it can write a place; at once, and whatever else they do."""
    alive, there = _nodes_that_simulate()

    def ask(what: Any, node: dict[str, Any], *arguments: Any) -> ray.ObjectRef:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        return what.options(scheduling_strategy=there).remote(*arguments)

    said = ray.get([ask(_say, node, packages, place) for node in alive], timeout=_SECONDS_TO_ANSWER)
    found = []
    for node, (versions, num_gpus, fault) in zip(alive, said, strict=True):
        before = time.time()  # a process waits there by now, so that it answers at once
        told, after = ray.get(ask(_clock, node), timeout=_SECONDS_TO_ANSWER), time.time()
        found.append(
            Node(
                address=node["NodeManagerAddress"],
                resources=node["Resources"],
                simulates=node in there,
                versions=versions,
                num_gpus=num_gpus,
                seconds_ahead=max(told - after, 0.0) + min(told - before, 0.0),
                fault=fault,
            )
        )
    return found


@ray.remote(num_cpus=0)
def _say(packages: tuple[str, ...], place: str | None) -> tuple[dict[str, str], int, str | None]:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # of a task that asks for no GPU Ray hides them
    import torch

    fault = None
    if place is not None:
        try:
            storage.check_writable(place)
        except (OSError, ValueError) as error:
            fault = str(error)
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return versions, torch.cuda.device_count(), fault


@ray.remote(num_cpus=0)
def _clock() -> float:
    return time.time()


def require_shared(uri: str) -> None:
    """Refuse a local folder where a cluster of several machines could not see the same one.

    Raises
    ------
    ValueError
        With the reason, and what to choose instead.
    """
    machines = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if storage.is_s3(uri) or len(machines) < 2:
        return
    kind = storage.file_system_type(uri)
    if kind not in _SHARED_FILE_SYSTEMS:
        raise ValueError(
            f"{uri} is a local folder ({kind}), and the cluster has {len(machines)} machines, each of which would "
            "write to a folder of its own. Choose s3://bucket/prefix, or a folder on a network file system."
        )


@dataclass(frozen=True)
class Room:
    """What each of some workers can have for itself, all of them at once."""

    num_cpus: int  # 0: the cluster cannot hold so many
    memory: int  # [bytes]


def room_for(num_workers: int, *, use_gpu: bool) -> Room:
    """Return what each of so many workers can have of the nodes that are there, a GPU among it if it uses one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def held(node: dict[str, float], num_cpus: int) -> int:
        return int(min(node.get("CPU", 0) // num_cpus, node.get("GPU", 0) if use_gpu else math.inf))

    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    fitting = (k for k in range(most, 0, -1) if sum(held(node, k) for node in nodes) >= num_workers)
    num_cpus = next(fitting, 0)
    if not num_cpus:
        return Room(0, 0)
    hosts = [node for node in nodes if held(node, num_cpus)]
    return Room(num_cpus, int(min(node.get("memory", 0) / min(held(node, num_cpus), num_workers) for node in hosts)))


def require_nodes_for_work() -> None:
    """Refuse a cluster in which no node may work: one that an autoscaler brings is there too late to be planned with.

    Raises
    ------
    ValueError
        With what to do.
    """
    if not any(node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes() if node["Alive"]):
        raise ValueError(
            "no node of the cluster has a CPU for work. Bring nodes first, by minReplicas on Kubernetes, "
            "by min_workers under `ray up`, by `ray start` elsewhere, and run the same command again."
        )


def where_to_simulate() -> dict[str, str] | None:
    """Return the label selector that keeps simulation off the head and off nodes with GPUs.

    A node's own label decides first: `ray start --labels raylens.simulate=yes` (or no). None where
    a lone node does everything.
    """
    nodes, there = _nodes_that_simulate()
    if len(nodes) == len(there) == 1:
        return None
    kept_off = [node["NodeID"] for node in nodes if node not in there]
    if not kept_off:
        return {SIMULATE: "!no"}
    if not there:
        logger.warning(
            "no node simulates yet: the head and those with GPUs are kept for other work. Waiting for one to join; "
            "a node started with --labels %s=yes would do.", SIMULATE,
        )  # fmt: skip
    return {SIMULATE: "!no", "ray.io/node-id": f"!in({','.join(kept_off)})"}


def where_to_predict() -> dict[str, str] | None:
    """Return the label selector of nodes that predict: those that simulate, or all if none that is there does."""
    nodes, there = _nodes_that_simulate()
    only_others = not there and any(node["Resources"].get("CPU", 0) for node in nodes)
    return None if only_others else where_to_simulate()


def numbers(num: int, num_tasks: int, *, where: dict[str, str] | None) -> ray.data.Dataset:
    """Return the numbers from 0 on, for so many tasks, on the nodes that a label selector names."""
    # The selector is the dataset's and not its tasks' alone: else an autoscaler, which is asked for more CPUs while all
    # are busy, would start GPU nodes too.
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.label_selector = where
    with ray.data.DataContext.current(context):
        return ray.data.range(num, override_num_blocks=num_tasks)


def num_cpus_that_simulate() -> int:
    """Return how many CPUs simulate now; none where all nodes that do have yet to join."""
    _, there = _nodes_that_simulate()
    return int(sum(node["Resources"].get("CPU", 0) for node in there))


def _nodes_that_simulate() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return all nodes that are there, and those of them that simulate; a lone one does everything, if it may work."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) == 1 and nodes[0]["Resources"].get("CPU", 0):
        return nodes, nodes
    return nodes, [node for node in nodes if _simulates(node)]


def _simulates(node: dict[str, Any]) -> bool:
    told = node["Labels"].get(SIMULATE)
    if told is not None:
        return told == "yes"
    return "node:__internal_head__" not in node["Resources"] and "GPU" not in node["Resources"]


def publish(place: str, **values: float) -> None:
    """Say in the metrics of the cluster how far the run that makes a place is: values of METRICS."""
    for name, value in values.items():
        _gauge(name).set(value, {"place": place})


@cache
def _gauge(name: str) -> ray.util.metrics.Gauge:
    return ray.util.metrics.Gauge(f"raylens_{name}", METRICS[name], ("place",))


def _quieten() -> None:
    """Leave the terminal to raylens's own progress."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is raised as well, and told once
