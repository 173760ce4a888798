"""Where simulation runs on a cluster of several nodes, and what it refuses there. Each node is a real raylet."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from raylets import cluster, descendants, is_loopback, listening, raylet

from raylens import storage
from raylens.config import Experiment, Simulation


def has_simulated(node) -> bool:
    """Whether a worker of a node has loaded the compiler of the kernel."""
    for pid in descendants(raylet(node)):
        try:
            if "llvmlite" in Path(f"/proc/{pid}/maps").read_text():
                return True
        except OSError:
            continue
    return False


SCRIPT = """
import json, sys
import ray
from raylens import generate
from raylens.config import Experiment

experiment = Experiment.parse(json.loads(sys.argv[1]))
made = generate.simulate(experiment.simulation, sys.argv[2], recipe="tiny", num_images=40, shard_size=1)
print(made.num_made, flush=True)
sys.stdin.read()  # the workers live as long as this driver does
"""


@contextmanager
def simulated(address: str, simulation: Simulation, root: Path) -> Iterator[int]:
    """A driver that has made its shards and still runs."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(Experiment(simulation=simulation).as_dict()), str(root)]
    environment = os.environ | {"RAY_ADDRESS": address}
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        yield int(driver.stdout.readline())
        driver.stdin.close()
    assert driver.returncode == 0


def test_simulation_keeps_off_the_head_and_off_nodes_with_gpus(tiny, tmp_path):
    """The head must answer, whatever happens, and a GPU is too dear to wait for lenses."""
    with (
        cluster({"num_cpus": 1}, {"num_cpus": 1, "num_gpus": 1}, {"num_cpus": 1}) as (nodes, (head, gpu, cpu)),
        simulated(nodes.address, tiny, tmp_path) as num_made,
    ):
        assert num_made == 40
        assert [has_simulated(node) for node in (head, gpu, cpu)] == [False, False, True]


def test_labels_decide_where_simulation_runs(tiny, tmp_path):
    """Who has only GPU nodes, or wants a node left alone, says so where the node is started."""
    yes, no = ({"labels": {"raylens.simulate": word}} for word in ("yes", "no"))
    with (
        cluster({"num_cpus": 1}, {"num_cpus": 1, "num_gpus": 1, **yes}, {"num_cpus": 1, **no}) as (nodes, started),
        simulated(nodes.address, tiny, tmp_path) as num_made,
    ):
        assert num_made == 40
        assert [has_simulated(node) for node in started] == [False, True, False]


ASK = """
import json, sys
from raylens import cluster

cluster.connect()
for _ in sys.stdin:
    told = [cluster.where_to_simulate(), cluster.where_to_predict(), cluster.num_cpus_that_simulate()]
    print(json.dumps(told), flush=True)
"""


def test_who_may_yet_be_brought_is_asked_for_by_what_it_is_for():
    """An autoscaler is told what a node must be; told nothing, it brings GPU nodes to simulate and to predict."""
    command, pipes = [sys.executable, "-c", ASK], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        cluster({"num_cpus": 0}) as (nodes, (head,)),
        subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": nodes.address}, **pipes) as driver,
    ):

        def asked() -> list:
            driver.stdin.write("\n")
            driver.stdin.flush()
            return json.loads(driver.stdout.readline())

        alone = asked()
        gpu = nodes.add_node(num_cpus=1, num_gpus=1)
        with_gpu = asked()
        nodes.add_node(num_cpus=3)
        with_both = asked()
        driver.stdin.close()

    def off(*kept_off) -> dict[str, str]:
        return {"raylens.simulate": "!no", "ray.io/node-id": f"!in({','.join(node.node_id for node in kept_off)})"}

    assert alone == [off(head), off(head), 0]
    assert with_gpu[1:] == [None, 0]  # rather than waiting, it predicts on what is there
    assert with_both[0] == with_both[1]
    assert with_both[0] in (off(head, gpu), off(gpu, head))
    assert with_both[2] == 3


RAY_FIRST = """
import sys
import ray.data
from raylens import cluster

cluster.connect()
print(ray.data.range(2).map(lambda row: row).take_all(), flush=True)  # there are workers
sys.stdin.read()
"""
RAYLENS_FIRST = f"import raylens\n{RAY_FIRST}"


@contextmanager
def connected(script: str) -> Iterator[subprocess.Popen]:
    """A process with a local Ray of its own, as a user has it: nothing in its environment speaks of Ray."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as driver:  # fmt: skip
        assert "{'id': 1}" in driver.stdout.readline()
        yield driver


def test_a_local_ray_listens_on_loopback_only():
    """Who starts on a laptop in a café opens nothing to the café, not even a door with a lock."""
    with connected(RAYLENS_FIRST) as driver:
        found = listening(driver.pid)

    assert len(found) > 5, found
    assert {address: who for address, who in found.items() if not is_loopback(address)} == {}


def test_who_imported_ray_first_is_told_that_it_listens_everywhere():
    """Ray reads how far to open itself when it is imported, so that raylens comes too late."""
    with connected(RAY_FIRST) as driver:
        assert not all(map(is_loopback, listening(driver.pid)))
        _, told = driver.communicate()

    assert "Import raylens first" in told


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is told to")
def test_workers_keep_the_memory_that_they_free(ray_cluster):
    """A step of training takes what the one before it has freed, in whichever thread it runs, and not new pages.

    At times a small block has been cut from what was freed, and a step needs new pages once more.
    """
    import ray

    @ray.remote
    def new_pages() -> list[int]:
        import torch

        counts = []

        def step() -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(1 << 24)
            counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

        for _ in range(10):
            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
        return counts

    first, *others = ray.get(new_pages.remote())
    assert statistics.median(others) < first / 10


def test_a_local_folder_is_refused_on_a_cluster_of_several_machines(tmp_path, cli):
    """Each machine would fill a folder of its own, and the dataset would be nowhere."""
    with cluster({"num_cpus": 1}, {"num_cpus": 1, "node_ip_address": "127.0.0.2"}) as (nodes, _):
        ran = cli("simulate", "smoke", "--to", str(tmp_path / "data"), RAY_ADDRESS=nodes.address)

    assert ran.returncode == 1
    (error,) = ran.errors
    assert "is a local folder" in error
    assert "the cluster has 2 machines" in error
    assert "s3://" in error
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("path", "kind"), [("/proc/self", "proc"), ("/dev/shm/not/there/yet", "tmpfs")]
)  # fmt: skip
def test_the_kind_of_file_system_is_that_of_the_deepest_mount(path, kind):
    """It says whether other machines may see the same folder."""
    assert storage.file_system_type(path) == kind
