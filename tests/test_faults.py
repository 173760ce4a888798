"""Whatever is killed, and whenever, the same command ends in the dataset of a run that nothing disturbed.

Processes are killed in the midst of the simulation, at moments that a seed decides; it stands in the test's name.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from raylets import cluster, descendants, raylet, title

from raylens.config import Experiment

# Shards of a tenth of a second and 370 kB: some four seconds of two CPUs lie between the first and the last.
NUM_SHARDS, SHARD_SIZE = 64, 100
SHARD_SECONDS = 0.1
SIMULATE = (
    "simulate", "paper-fixed-coarse", "--set", "camera.supersampling=2",
    "--num-images", str(NUM_SHARDS * SHARD_SIZE), "--shard-size", str(SHARD_SIZE),
)  # fmt: skip
TIMEOUT = 300  # seconds; for a run that takes fifteen when the machine has nothing else to do
INTERRUPTED = "error: interrupted; run the same command again to go on."


@pytest.fixture(scope="module")
def undisturbed(cli, tmp_path_factory) -> Path:
    """The dataset as one run makes it that nothing disturbs, on a local Ray."""
    ran = cli(*SIMULATE, "--to", str(tmp_path_factory.mktemp("undisturbed")), timeout=TIMEOUT)
    assert ran.returncode == 0, ran
    assert ran.facts["num_made"] == NUM_SHARDS
    return Path(ran.facts["dataset"])


def test_a_dataset_survives_a_kill_of_each_kind(undisturbed, main, tmp_path):
    """Two drivers of a cluster die; the third run loses a worker and a whole node, and goes on by itself."""
    chance, folder = random.Random(0), tmp_path / undisturbed.name
    with cluster({"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1}) as (nodes, _):
        joined = {"RAY_ADDRESS": nodes.address}
        for number, last in ((signal.SIGKILL, NUM_SHARDS // 4), (signal.SIGINT, NUM_SHARDS // 2)):
            with begin(tmp_path, **joined) as run:
                wait_for_a_moment(chance, folder, run, last)
                kill_driver(run, number)
        stood = standing(folder)
        with begin(tmp_path, **joined) as run:
            wait_for_a_moment(chance, folder, run, NUM_SHARDS * 3 // 4)
            kill_worker(chance, [raylet(node) for node in nodes.list_all_nodes()], run)
            wait_for_a_moment(chance, folder, run, NUM_SHARDS - 4)
            kill_node(chance, nodes)
            facts = finish(run)

    assert_kept(stood, facts, folder)
    assert_undisturbed(folder, undisturbed, main)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_survives_the_death_of_three_workers(undisturbed, main, tmp_path, seed):
    """The kernel kills the largest process when memory runs out, and that is a worker; nobody should have to notice."""
    chance, folder = random.Random(seed), tmp_path / undisturbed.name
    with begin(tmp_path) as run:
        for k, simulates in ((1, True), (2, False), (3, True)):
            wait_for_a_moment(chance, folder, run, NUM_SHARDS * k // 4)
            kill_worker(chance, [run.pid], run, simulates)
        facts = finish(run)

    assert_kept({}, facts, folder)
    assert_undisturbed(folder, undisturbed, main)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_survives_the_death_of_three_nodes(undisturbed, main, tmp_path, seed):
    """Spot machines are taken away in mid-task, and others come."""
    chance, folder = random.Random(seed), tmp_path / undisturbed.name
    with (
        cluster({"num_cpus": 0}, {"num_cpus": 1}, {"num_cpus": 1}) as (nodes, _),
        begin(tmp_path, RAY_ADDRESS=nodes.address) as run,
    ):
        for k in range(1, 4):
            wait_for_a_moment(chance, folder, run, NUM_SHARDS * k // 4)
            kill_node(chance, nodes)
            nodes.add_node(num_cpus=1)
        facts = finish(run)

    assert_kept({}, facts, folder)
    assert_undisturbed(folder, undisturbed, main)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_what_three_killed_drivers_have_begun_the_same_command_finishes(undisturbed, main, tmp_path, number, seed):
    """At once, while the workers of the killed one may still write: its Ray ends only when it notices."""
    chance, folder = random.Random(seed), tmp_path / undisturbed.name
    for k in range(1, 4):
        stood = standing(folder)
        with begin(tmp_path) as run:
            wait_for_a_moment(chance, folder, run, NUM_SHARDS * k // 4)
            # A terminal sends its interrupt to all that run in it, a scheduler to the driver alone.
            kill_driver(run, number, group=number == signal.SIGINT and seed == 1)
        assert stood.items() < standing(folder).items()
        assert not (folder / "manifest.json").exists()
    stood = standing(folder)
    with begin(tmp_path) as run:
        facts = finish(run)

    assert_kept(stood, facts, folder)
    assert_undisturbed(folder, undisturbed, main)


@pytest.mark.slow
def test_a_driver_killed_after_the_last_shard_leaves_only_the_manifest_to_write(undisturbed, main, tmp_path):
    """Nothing is made twice, and the manifest is that of a run that made all of it."""
    folder = tmp_path / undisturbed.name
    with begin(tmp_path) as run:
        wait_until(lambda: len(standing(folder)) == NUM_SHARDS, run)
        kill_driver(run, signal.SIGKILL)
    stood = standing(folder)
    with begin(tmp_path) as run:
        facts = finish(run)

    assert facts["num_made"] == 0
    assert_kept(stood, facts, folder)
    assert_undisturbed(folder, undisturbed, main)


@pytest.mark.parametrize("damage", ["a flipped bit", "truncated"])
def test_a_damaged_shard_is_named_by_verify_and_made_again_by_simulate(main, tiny, tmp_path, ray_cluster, damage):
    """One command finds it, the other mends it, and neither touches the rest."""
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps(Experiment(name="tiny", simulation=tiny).as_dict()))
    simulate = ("simulate", str(recipe), "--to", str(tmp_path), "--num-images", "12", "--shard-size", "4")
    folder = Path(main(*simulate).facts["dataset"])
    made = contents(folder)
    place = folder / "part-00001.parquet"
    content = bytearray(made[place.name])
    content[len(content) // 2] ^= 1
    place.write_bytes(content if damage == "a flipped bit" else content[:-1])

    found = main("verify", str(folder))
    mended = main(*simulate)

    assert_refused(found, place.name)
    assert len(found.facts["wrong"]) == 1
    assert (mended.facts["num_made"], mended.facts["num_skipped"]) == (1, 2)
    assert contents(folder) == made
    assert main("verify", str(folder)).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in the middle", "at the manifest"])
def test_a_full_disk_is_one_line_and_room_is_all_the_same_command_needs(undisturbed, main, disk, when):
    """A disk fills at night; in the morning one makes room, and nothing else."""
    folder, whole = disk.seen / undisturbed.name, sum(pages(path) for path in undisturbed.glob("*.parquet"))
    disk.remount(f"size={whole // 2 if when == 'in the middle' else whole + 5 * PAGE}")
    with begin(disk.path, disk.command) as run:
        refused = end(run)
    stood, made = standing(folder), contents(folder)
    left = os.listdir(folder)
    disk.remount(f"size={2 * whole}")
    with begin(disk.path, disk.command) as run:
        facts = finish(run)

    assert_refused(refused, f"error: {disk.path}/{undisturbed.name}/")
    assert refused.stderr.endswith(": no space left on device.\n")
    assert 0 < len(stood) < NUM_SHARDS if when == "in the middle" else len(stood) == NUM_SHARDS
    assert made.items() <= contents(undisturbed).items()
    assert set(left) == {"dataset.json", *stood}  # nothing half-written
    assert_kept(stood, facts, folder)
    assert_undisturbed(folder, undisturbed, main)


@pytest.mark.slow
def test_a_folder_that_turns_read_only_is_one_line_and_the_same_command_goes_on_later(undisturbed, main, disk):
    """So Linux answers a disk that fails; what stood is kept."""
    folder, whole = disk.seen / undisturbed.name, sum(pages(path) for path in undisturbed.glob("*.parquet"))
    disk.remount(f"size={2 * whole}")
    with begin(disk.path, disk.command) as run:
        wait_for_a_moment(random.Random(0), folder, run, NUM_SHARDS // 2)
        wait_until(lambda: disk.remount("ro", check=False), run)  # not while a file is being written
        refused = end(run)
    stood, made = standing(folder), contents(folder)
    disk.remount("rw")
    with begin(disk.path, disk.command) as run:
        facts = finish(run)

    assert_refused(refused, f"error: {disk.path}/{undisturbed.name}/")
    assert refused.stderr.endswith(": read-only file system.\n")
    assert made.items() <= contents(undisturbed).items()
    assert_kept(stood, facts, folder)
    assert_undisturbed(folder, undisturbed, main)


@contextmanager
def begin(root: Path, prefix: tuple[str, ...] = (), **environment: str) -> Iterator[subprocess.Popen]:
    """A run that has begun, and is gone in the end."""
    run = subprocess.Popen(
        [*prefix, sys.executable, "-m", "raylens", *SIMULATE, "--to", str(root)],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield run
    finally:
        if run.poll() is None:
            run.kill()
        run.communicate()


def end(run: subprocess.Popen) -> subprocess.CompletedProcess:
    out, errors = run.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(run.args, run.returncode, out, errors)


def finish(run: subprocess.Popen) -> dict:
    """The facts of a run that nobody disturbs any more."""
    ran = end(run)
    assert ran.returncode == 0, ran
    return json.loads(ran.stdout.splitlines()[-1])


def kill_driver(run: subprocess.Popen, number: int, group: bool = False) -> None:
    (os.killpg if group else os.kill)(run.pid, number)
    ran = end(run)
    if number == signal.SIGINT:
        assert_refused(ran, INTERRUPTED)
    else:
        assert ran.returncode == -number


def kill_worker(chance: random.Random, above: list[int], run: subprocess.Popen, simulates: bool = True) -> None:
    """Kill one of the workers that Ray has started below other processes: one that simulates, or another."""

    def workers() -> list[int]:
        titles = {pid: title(pid) for ancestor in above for pid in descendants(ancestor)}
        # A worker without work is of no interest; and with an agent of its Ray ends the node.
        busy = {pid for pid, of in titles.items() if of.startswith("ray::") and not of.endswith(("IDLE", "Agent"))}
        return sorted(pid for pid in busy if ("Map" in titles[pid]) == simulates)

    os.kill(chance.choice(wait_until(workers, run)), signal.SIGKILL)


def kill_node(chance: random.Random, nodes) -> None:
    node = chance.choice(sorted(nodes.worker_nodes, key=lambda node: node.unique_id))
    nodes.remove_node(node, allow_graceful=False)


def wait_for_a_moment(chance: random.Random, folder: Path, run: subprocess.Popen, last: int) -> None:
    """Return when some more shards stand, at most `last`, and then somewhere in the making of the next ones."""
    num = chance.randint(min(len(standing(folder)) + 1, last), last)
    wait_until(lambda: len(standing(folder)) >= num, run)
    time.sleep(chance.uniform(0, SHARD_SECONDS))


def wait_until(condition: Callable[[], Any], run: subprocess.Popen) -> Any:
    deadline = time.monotonic() + TIMEOUT
    while not (held := condition()):
        assert run.poll() is None, f"the run ended before its time: {end(run)}"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return held


def standing(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards, and what changes when one is written again."""
    stats = {path.name: path.stat() for path in folder.glob("*.parquet")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def assert_kept(stood: dict[str, tuple[int, int]], facts: dict, folder: Path) -> None:
    """A shard that stood is skipped, not made again, and the run says so."""
    assert facts["num_made"] + facts["num_skipped"] == facts["num_shards"] == NUM_SHARDS
    assert facts["num_skipped"] >= len(stood)
    assert stood.items() <= standing(folder).items()


def assert_undisturbed(folder: Path, undisturbed: Path, main) -> None:
    """The dataset is complete and sound, each index stands in it once, and it is the undisturbed one to the byte."""
    verified = main("verify", str(folder))
    assert verified.returncode == 0, verified
    indices = np.concatenate(
        [pq.read_table(path, columns=["index"])["index"] for path in sorted(folder.glob("*.parquet"))]
    )
    np.testing.assert_array_equal(indices, np.arange(NUM_SHARDS * SHARD_SIZE))
    assert standing(folder).keys() == standing(undisturbed).keys()
    made, expected = contents(folder), contents(undisturbed)
    assert [name for name in expected if made[name] != expected[name]] == []
    assert (folder / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()


def assert_refused(ran, words: str) -> None:
    """One line, the last and a short one, and no traceback."""
    assert ran.returncode == 1, ran
    errors = [line for line in ran.stderr.splitlines() if line.startswith("error:")]
    assert errors == ran.stderr.splitlines()[-1:], ran.stderr
    assert words in errors[0]
    assert len(errors[0]) < 400
    assert "Traceback" not in ran.stderr


PAGE = os.sysconf("SC_PAGE_SIZE")


def pages(path: Path) -> int:
    """The bytes that a file takes of a file system in memory."""
    return -(-path.stat().st_size // PAGE) * PAGE


class Disk:
    """A small file system in memory, which only those processes see that are started with its `command`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        mount = f"mount -t tmpfs -o size=1m tmpfs {path} && echo mounted && exec cat"
        reasons = []
        for own_users in ([], ["--map-root-user"]):  # root may mount, others in a world where they are root
            self.holder = subprocess.Popen(
                ["unshare", "--mount", *own_users, "sh", "-c", mount],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            if self.holder.stdout.readline() == "mounted\n":
                break
            reasons.append(self.holder.communicate()[1].strip())
        else:
            pytest.skip(f"no file system can be mounted: {'; '.join(reasons)}")
        users = ["--user", "--preserve-credentials"] if own_users else []
        self.command = ("nsenter", "--target", str(self.holder.pid), "--mount", *users)
        self.seen = Path(f"/proc/{self.holder.pid}/root{path}")  # from outside

    def remount(self, options: str, check: bool = True) -> bool:
        """Change the file system, and return whether that could be done."""
        done = subprocess.run([*self.command, "mount", "-o", f"remount,{options}", str(self.path)], capture_output=True)
        assert not check or done.returncode == 0, done
        return done.returncode == 0


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.holder.communicate()  # it ends with its input
