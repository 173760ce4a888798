"""What this machine and this cluster can do, told before anything is paid for."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

from raylens.config import Experiment

if TYPE_CHECKING:
    from raylens.cluster import Node

# What decides a dataset's bytes or is spoken between the nodes.
_PACKAGES = ("raylens", "ray", "torch", "numpy", "numba", "astropy", "lenstronomy", "pyarrow", "s3fs")
_SECONDS_APART = 60.0  # between clocks; S3 refuses requests that are a quarter of an hour old


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    fine: bool
    detail: str


def examine(place: str | None = None) -> list[Finding]:
    """Return what was found, in the order in which a run would meet it; with a place, whether it can be written."""
    findings = [
        _try("machine", _machine),
        _try("packages", _packages),
        _try("torch", _torch),
        _try("simulation", _simulation),
        _try("storage", lambda: _storage(place)),
        _try("Ray", _ray),
    ]
    if not findings[-1].fine:
        return findings
    nodes: list[Node] = []
    findings += [_try("authentication", _authentication), _try("nodes", lambda: _nodes(nodes, place))]
    if nodes:
        findings += [
            _try("versions", lambda: _versions(nodes)),
            _try("writing", lambda: _writing(nodes, place)),
            _try("GPUs", lambda: _gpus(nodes)),
            _try("data", lambda: _data(nodes)),
            _try("clocks", lambda: _clocks(nodes)),
        ]
    return findings


def _try(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except Exception as error:  # whatever is wrong is what the doctor is there to tell
        return Finding(name, False, str(error).splitlines()[0] if str(error) else type(error).__name__)


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(os.getcwd()).free
    return (
        f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB of memory, "
        f"{free / 2**30:.0f} GiB of disk free here, "
        f"{platform.system()} {platform.machine()}, Python {sys.version.split()[0]}"
    )


def _packages() -> str:
    return ", ".join(f"{name} {version(name)}" for name in _PACKAGES)


def _torch() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(gpus)} GPUs: {', '.join(gpus)}" if gpus else "no GPU: networks train on the CPU"


def _simulation() -> str:
    from raylens.simulate import simulate_block

    simulation = Experiment().simulation
    simulate_block(simulation, [0])  # compiles
    started = time.perf_counter()
    simulate_block(simulation, range(256))
    return f"{256 / (time.perf_counter() - started):,.0f} images/s on one core (paper-fixed)"


def _storage(place: str | None) -> str:
    from raylens import storage

    if place is None:
        storage.check_writable(tempfile.gettempdir())
        return "local paths; `raylens doctor s3://bucket/prefix` tries S3"
    storage.check_writable(place)
    return f"{storage.absolute(place)} can be written"


def _ray() -> str:
    from raylens import cluster

    held = cluster.connect()
    where = os.environ.get("RAY_ADDRESS") or "a local cluster, started for this check"
    return f"{where}: {held.num_nodes} nodes, {held.num_cpus} CPUs, {held.num_gpus} GPUs"


def _authentication() -> str:
    """Whether a stranger could submit a job."""
    from raylens import cluster

    answer = cluster.answer_to_strangers()
    if answer is None:
        return "no job can be submitted here" if "RAY_ADDRESS" not in os.environ else "out of reach from here"
    if answer != 401:
        raise PermissionError(
            f"whoever reaches the dashboard may submit jobs (HTTP {answer} without a token); "
            "start the cluster with RAY_AUTH_MODE=token."
        )
    return "closed to those without the token"


def _nodes(found: list[Node], place: str | None) -> str:
    from raylens import cluster, storage

    found += cluster.survey(_PACKAGES, None if place is None else storage.absolute(place))
    answered = f"{len(found)} answered: {', '.join(sorted({node.address for node in found}))}"
    if any(node.resources.get("CPU", 0) >= 1 for node in found):
        return answered
    return f"{answered}; none of them is for work, so bring one of each kind and ask again"


def _versions(nodes: list[Node]) -> str:
    here = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    for node in nodes:
        for name, there in node.versions.items():
            if _release(there) != _release(here[name]):
                raise ValueError(
                    f"{node.address} has {name} {there}, and this process {here[name]}; "
                    "start all nodes from one image, or install what constraints.txt names on each."
                )
    return "the same on all nodes"


def _release(version: str) -> str:
    """Return a version without what it was built for: torch for CPUs and for CUDA work together."""
    return version.partition("+")[0]


def _writing(nodes: list[Node], place: str | None) -> str:
    for node in nodes:
        if node.fault is not None:
            raise OSError(f"{node.address} cannot write there: {node.fault}")
    return "not tried without a place" if place is None else f"{place} can be written from all nodes"


def _gpus(nodes: list[Node]) -> str:
    for node in nodes:
        if (counted := int(node.resources.get("GPU", 0))) > node.num_gpus:
            raise ValueError(
                f"on {node.address} Ray counts {counted} GPUs, and torch sees {node.num_gpus}; "
                "look at the driver, and whether the image has torch for CUDA."
            )
    num = sum(node.num_gpus for node in nodes if node.resources.get("GPU"))
    return f"torch sees all {num} that Ray counts" if num else "Ray counts none"


def _data(nodes: list[Node]) -> str:
    there = [node for node in nodes if node.simulates and node.resources.get("CPU", 0) >= 1]
    if not there:
        return "no node simulates now, as the head and those with GPUs are kept for other work; one has to join"
    return f"{sum(int(node.resources['CPU']) for node in there)} CPUs on {len(there)} nodes simulate"


def _clocks(nodes: list[Node]) -> str:
    worst = max(nodes, key=lambda node: abs(node.seconds_ahead))
    if abs(worst.seconds_ahead) > _SECONDS_APART:
        raise ValueError(
            f"that of {worst.address} is {worst.seconds_ahead:+,.0f} s from this one; synchronise it, "
            "or S3 refuses what it asks for and times in the records mean nothing."
        )
    return f"within {max(abs(worst.seconds_ahead), 1):.0f} s of each other"
