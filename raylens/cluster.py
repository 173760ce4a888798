"""Connects to Ray, and says what the cluster can give.

RAY_ADDRESS chooses a cluster, and RAY_AUTH_MODE must then say how it is protected. Without it a
local one is started, on loopback and behind a token of its own, and never one that happens to run
is joined.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray
import ray.data


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
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
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


def _quieten() -> None:
    """Leave the terminal to raylens's own progress."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # an error is raised as well, and told once
