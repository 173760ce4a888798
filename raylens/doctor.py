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
from typing import NamedTuple

from raylens.config import Experiment


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    fine: bool
    detail: str


def examine(place: str | None = None) -> list[Finding]:
    """Return what was found, in the order in which a run would meet it; with a place, whether it can be written."""
    checks: dict[str, Callable[[], str]] = {
        "machine": _machine,
        "packages": _packages,
        "torch": _torch,
        "simulation": _simulation,
        "storage": lambda: _storage(place),
        "Ray": _ray,
    }
    findings = []
    for name, check in checks.items():
        try:
            findings.append(Finding(name, True, check()))
        except Exception as error:  # whatever is wrong is what the doctor is there to tell
            findings.append(Finding(name, False, str(error).splitlines()[0] if str(error) else type(error).__name__))
    return findings


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(os.getcwd()).free
    return (
        f"{len(os.sched_getaffinity(0))} cores, {memory / 2**30:.0f} GiB of memory, "
        f"{free / 2**30:.0f} GiB of disk free here, "
        f"{platform.system()} {platform.machine()}, Python {sys.version.split()[0]}"
    )


def _packages() -> str:
    names = ("raylens", "ray", "torch", "numpy", "numba", "astropy", "lenstronomy", "pyarrow", "s3fs")
    return ", ".join(f"{name} {version(name)}" for name in names)


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
