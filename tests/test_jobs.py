"""The entry points for `ray job submit`, on real clusters behind a token, with real object storage."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import local
import pytest
import s3fs
from raylets import descendants, is_loopback, listening, title, wait
from test_reproduce import TINY

from raylens.config import Experiment

JOBS = Path(__file__).parents[1] / "jobs"
ANEW = ("results.json", "report.html", "winner.json")
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Cluster:
    """Where jobs are submitted, as its users have it: by what their environment says."""

    environment: dict[str, str]
    bucket: str
    pid: int  # of the process that holds the head
    nodes: Callable[[], list[int]]  # the raylets of the nodes that work
    folder: Path  # where Ray writes its logs

    def ask(self, *words: str) -> str:
        """What a `ray` command says."""
        done = subprocess.run([RAY, *words], env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def submitted(self, folder: Path, *entrypoint: str) -> Iterator[subprocess.Popen]:
        """`ray job submit`, which follows the logs of the job and ends as it does."""
        command = [RAY, "job", "submit", "--working-dir", str(folder), "--", "python", *entrypoint]
        environment = self.environment | {"PYTHONUNBUFFERED": "1"}
        with subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as job:
            try:
                yield job
            finally:
                job.kill()

    def finished(self, folder: Path, *entrypoint: str) -> tuple[int, list[str]]:
        """How a job ended, and what it said."""
        with self.submitted(folder, *entrypoint) as job:
            lines, _ = job.communicate(timeout=300)
        return job.returncode, lines.splitlines()

    def made(self, under: str) -> dict[str, str]:
        """The objects below a key, and when each was written; of those that are written anew, what they say."""
        keys = {name.lower(): self.environment[f"AWS_{name}"] for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY")}
        file_system = s3fs.S3FileSystem(
            key=keys["access_key_id"], secret=keys["secret_access_key"],
            endpoint_url=self.environment["AWS_ENDPOINT_URL"], use_listings_cache=False, skip_instance_cache=True,
        )  # fmt: skip
        found = file_system.find(f"{self.bucket}/{under}", detail=True)
        return {
            key: facts["ETag"] + ("" if key.endswith(ANEW) else f" {facts['LastModified']}")
            for key, facts in found.items() if not key.endswith("/")
        }  # fmt: skip


def facts_of(lines: list[str]) -> dict:
    """The JSON object with which a job ended; behind it `ray job submit` says how."""
    return json.loads(next(line for line in reversed(lines) if line.startswith("{")))


def read_until(job: subprocess.Popen, sign: str) -> list[str]:
    """The lines of a log up to the first with a sign in it."""
    lines: list[str] = []
    for line in job.stdout:
        lines.append(line)
        if sign in line:
            return lines
    raise AssertionError(f"the job ended before it said {sign!r}:\n{''.join(lines)}")


@contextmanager
def started(
    folder: Path, *, head_cpus: int, workers: int = 0, to_come: dict[str, dict] | None = None, **environment: str
) -> Iterator[Cluster]:
    """A cluster of so many nodes that `ray start` started, and how to use it; an autoscaler starts those to come.

    Alone, a head keeps to loopback. `ray start` lets others join only on all interfaces, behind the token.
    """
    token = folder / "token"
    token.write_text(secrets.token_hex())  # other nodes can join only on all interfaces
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    told = {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    if not workers and not to_come:
        told["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    gcs, dashboard, *agents = local.free_ports(3 + workers)
    address, api = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
    common = [
        RAY, "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats",
        f"--object-store-memory={2**28}", "--num-gpus=0",
    ]  # fmt: skip
    head = [
        "--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--num-cpus={head_cpus}", f"--dashboard-agent-listen-port={agents[0]}",
    ]  # fmt: skip
    answers = [RAY, "job", "list"]
    with ExitStack() as running:
        temporary = running.enter_context(
            tempfile.TemporaryDirectory(prefix="raylens-")
        )  # its sockets want short names
        around = foreign | told | environment | {"RAY_TMPDIR": temporary}
        user = around | {"RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": api}
        log = running.enter_context(open(folder / "log", "w"))

        def start(*words: str, **more: str) -> subprocess.Popen:
            node = subprocess.Popen([*common, *words], env=around | more, stdout=log, stderr=log)
            running.callback(node.wait, 60)
            running.callback(node.terminate)
            return node

        if to_come:
            (folder / "scaling.json").write_text(json.dumps(scaling(to_come, address)))
            nodes = [start(*head, f"--autoscaling-config={folder / 'scaling.json'}", **SCALES)]
            running.callback(end_descendants, nodes[0].pid)  # nodes that have come would outlive the head
        else:
            nodes = [start(*head)]
        wait(lambda: subprocess.run(answers, env=user, capture_output=True, timeout=60).returncode == 0)
        for agent in agents[1:]:
            nodes.append(start(f"--address={address}", "--num-cpus=2", f"--dashboard-agent-listen-port={agent}"))

        def raylets() -> list[int]:
            working = nodes[1:] or nodes
            return [pid for node in working for pid in descendants(node.pid) if "raylet/raylet" in title(pid)]

        def complete() -> bool:
            assert all(node.poll() is None for node in nodes), (folder / "log").read_text()[-3000:]
            return len(raylets()) == max(workers, 1)

        wait(complete)
        yield Cluster(user, "bucket", nodes[0].pid, raylets, Path(temporary))


HEAD_ID = "f" * 51 + "00000"  # by which Ray's provider of nodes on one machine knows the head
SCALES = {
    "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}  # fmt: skip


def scaling(node_types: dict[str, dict], address: str) -> dict:
    """What tells Ray's autoscaler which nodes it may start, each a raylet here, with a patience of six seconds."""
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    none = {name: [] for name in (
        "setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands",
        "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
    )}  # fmt: skip
    return none | {
        "cluster_name": "tests", "max_workers": 8, "idle_timeout_minutes": 0.1, "upscaling_speed": 8.0,
        "provider": {
            "type": "external", "launch_multiple": True, "head_node_id": HEAD_ID, "gcs_address": address,
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        },
        "available_node_types": {"ray.head.default": head} | node_types, "head_node_type": "ray.head.default",
        "docker": {}, "auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False,
    }  # fmt: skip


def end_descendants(pid: int) -> None:
    for one in list(descendants(pid)):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


@contextmanager
def brought_up(folder: Path) -> Iterator[Cluster]:
    """The cluster of one head and two worker nodes that `cluster/local.py` brings up, with a server of its own."""
    up = subprocess.run(
        [sys.executable, local.__file__, "up", "--cpus=2", f"--folder={folder}"], capture_output=True, text=True
    )
    assert up.returncode == 0, up.stderr
    try:
        show = "import json, os; print(json.dumps(dict(os.environ)))"
        told = subprocess.run(
            ["bash", "-c", f"source {folder}/environment; '{sys.executable}' -c '{show}'"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        keeper, _ = json.loads((folder / "processes.json").read_text())["keeper"]
        # A node without CPUs is the head, whose raylet was started first.
        yield Cluster(
            json.loads(told.stdout), local.BUCKET, keeper,
            lambda: sorted(pid for pid in descendants(keeper) if "raylet/raylet" in title(pid))[1:], folder,
        )  # fmt: skip
    finally:
        subprocess.run([sys.executable, local.__file__, "down", f"--folder={folder}"], check=True)


@pytest.fixture(scope="module")
def one_node(s3, tmp_path_factory) -> Iterator[Cluster]:
    """`ray start --head`, and nothing else."""
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with started(tmp_path_factory.mktemp("one"), head_cpus=2, **aws) as cluster:
        yield cluster


@pytest.fixture(params=["ray start", "cluster/local.py"])
def three_nodes(request, s3, tmp_path_factory) -> Iterator[Cluster]:
    """A head that takes no work, and two worker nodes."""
    folder = tmp_path_factory.mktemp("three")
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    how = started(folder, head_cpus=0, workers=2, **aws) if request.param == "ray start" else brought_up(folder)
    with how as cluster:
        yield cluster


@pytest.fixture
def work(tmp_path) -> Callable[..., Path]:
    """A folder to submit: the jobs as they stand, a recipe, and a space of it."""

    def folder(**changes: object) -> Path:
        shutil.copytree(JOBS, tmp_path / "work" / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
        recipe = Experiment.parse(TINY).override(changes).as_dict()
        (tmp_path / "work" / "tiny.json").write_text(json.dumps(recipe))
        space = {
            "base": "smoke",
            "name": "tiny",
            "recipe": "tiny.json",
            "epochs": [1, 2],
            "values": {"num_layers": [1], "filters": [2, 4], "growth": [1]},
        }
        (tmp_path / "work" / "space.json").write_text(json.dumps(space))
        return tmp_path / "work"

    return folder


def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(one_node, work):
    """A night's work is resumed by the command that began it."""
    folder, command = work(), ("jobs/reproduce.py", "tiny.json", "--to", f"s3://{one_node.bucket}/stopped")
    with one_node.submitted(folder, *command) as job:
        begun = read_until(job, "alpha-cnn  workers")
        (name,) = {word.strip("'") for line in begun for word in line.split() if word.startswith("'raysubmit_")}
        one_node.ask("job", "stop", name)
        job.communicate(timeout=60)
    assert "was stopped" in one_node.ask("job", "status", name)
    before = one_node.made("stopped")
    assert not any(key.endswith("results.json") for key in before)

    status, lines = one_node.finished(folder, *command)

    assert status == 0, "\n".join(lines)
    after = one_node.made("stopped")
    assert_went_on(before, after, lines)
    status, again = one_node.finished(folder, *command)
    assert status == 0, "\n".join(again)
    assert one_node.made("stopped") == after  # there was nothing to do
    assert facts_of(again)["metrics"] == facts_of(lines)["metrics"]
    token = Path(one_node.environment["RAY_AUTH_TOKEN_PATH"]).read_bytes()
    logs = [path.read_bytes() for path in one_node.folder.rglob("*") if path.is_file()] + ["\n".join(lines).encode()]
    for secret in (token, one_node.environment["AWS_SECRET_ACCESS_KEY"].encode()):
        assert not any(secret in log for log in logs)
    assert any(b"jobs/reproduce.py" in log for log in logs)  # the search finds what is there


def assert_went_on(before: dict[str, str], after: dict[str, str], lines: list[str]) -> None:
    """A job that was lost in its second training ended at last, and made none of the data or the first one again."""
    data = {key for key in before if key.endswith((".parquet", "manifest.json"))}
    finished = {key for key in before if "-n-cnn-" in key and key.endswith(("model.safetensors", "model.json"))}
    assert len(data) == 16  # a shard and a manifest of each split
    assert len(finished) == 3  # the best checkpoint among them
    assert {key: after[key] for key in data | finished} == {key: before[key] for key in data | finished}
    assert facts_of(lines)["report"].removeprefix("s3://") in after


@pytest.mark.slow
def test_a_job_goes_on_where_a_cluster_was_lost_with_its_head(s3, tmp_path_factory, work):
    """On the next cluster, as all that it has written is in the bucket."""
    folder, command = work(), ("jobs/reproduce.py", "tiny.json", "--to", "s3://bucket/lost")
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    with started(tmp_path_factory.mktemp("first"), head_cpus=2, **aws) as cluster:
        with cluster.submitted(folder, *command) as job:
            read_until(job, "alpha-cnn  workers")
            end_descendants(cluster.pid)
            job.communicate(timeout=120)
        assert job.returncode != 0
        before = cluster.made("lost")

    with started(tmp_path_factory.mktemp("second"), head_cpus=2, **aws) as cluster:
        status, lines = cluster.finished(folder, *command)
        after = cluster.made("lost")

    assert status == 0, "\n".join(lines)
    assert_went_on(before, after, lines)


def test_a_head_alone_listens_on_loopback_only(one_node):
    """As the how-to for a workstation says, whose colleagues share its network."""
    found = listening(one_node.pid)

    assert len(found) > 5, found
    assert {address: who for address, who in found.items() if not is_loopback(address)} == {}


@pytest.mark.slow
def test_a_job_survives_its_node_and_finds_nothing_to_do_when_it_is_submitted_again(three_nodes, work):
    """Spot nodes go in the night. The training that ran there goes on elsewhere, and nothing is made twice."""
    epochs = {f"{network}.training.num_epochs": 60 for network in ("n_cnn", "alpha_cnn")}
    folder = work(**{"num_images.train": 2000}, **epochs)
    command = ("jobs/reproduce.py", "tiny.json", "--to", f"s3://{three_nodes.bucket}/survived")
    with three_nodes.submitted(folder, *command) as job:
        read_until(job, " 3 of 60 ")
        (lost,) = (
            node for node in three_nodes.nodes()
            if any("TrainWorker" in title(pid) for pid in descendants(node))
        )  # fmt: skip
        os.kill(lost, signal.SIGKILL)
        rest, _ = job.communicate(timeout=400)
    assert job.returncode == 0, rest
    assert len(three_nodes.nodes()) == 1
    first, before = facts_of(rest.splitlines()), three_nodes.made("survived")

    status, lines = three_nodes.finished(folder, *command)

    assert status == 0, "\n".join(lines)
    assert three_nodes.made("survived") == before
    assert facts_of(lines)["metrics"] == first["metrics"]


@pytest.mark.slow
def test_each_job_submitted_again_finds_its_work_done(one_node, work):
    """One after the other, as the stages of an experiment; each of them twice."""
    folder = work()
    root = f"s3://{one_node.bucket}/stages"

    def made() -> dict[str, str]:
        """What the stages have made; the record of a campaign counts the calls as well."""
        ours = ("campaign.json", "campaign/report.html")
        return {key: when for key, when in one_node.made("stages").items() if not key.endswith(ours)}

    def twice(*command: str) -> dict:
        status, lines = one_node.finished(folder, *command)
        assert status == 0, "\n".join(lines)
        before = made()
        status, again = one_node.finished(folder, *command)
        assert status == 0, "\n".join(again)
        assert made() == before
        return facts_of(again)

    data = twice("jobs/simulate.py", "tiny.json", "--to", f"{root}/data")["dataset"]
    twice("jobs/train.py", "n-cnn", "--data", data, "--to", f"{root}/n-cnn", "--recipe", "tiny.json")
    told = twice(
        "jobs/tune.py", "space.json", "--data", data, "--to", f"{root}/campaign", "--searcher", "random",
        "--num-trials", "2",
    )  # fmt: skip

    assert (told["campaign"], told["num_trials"]) == (f"{root}/campaign", 2)


@pytest.mark.slow
def test_nodes_come_when_a_job_wants_them_and_go_when_it_has_ended(s3, tmp_path, work):
    """What makes a cluster cheap: nothing runs between jobs but the head, and no GPU is paid for while images are made.

    The autoscaler, the labels and the sizes of tasks are those of `cluster/kuberay`; what starts a node is not.
    """
    room = {"object_store_memory": 2**28}
    to_come = {
        "simulate": {"resources": {"CPU": 1, **room}, "labels": {"raylens.simulate": "yes"}, "max_workers": 4},
        "train": {"resources": {"CPU": 1, "GPU": 1, **room}, "labels": {"raylens.simulate": "no"}, "max_workers": 1},
    }
    to_come = {name: {"node_config": {}, "min_workers": 0} | kind for name, kind in to_come.items()}
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    command = ("jobs/simulate.py", "smoke", "--to", f"s3://bucket/{tmp_path.name}", "--num-images", "40000")
    most: Counter[str] = Counter()
    with started(tmp_path, head_cpus=0, to_come=to_come, **aws) as cluster:

        def there() -> Counter[str]:
            """The nodes that there are, by kind, as what they hold tells."""
            told = cluster.ask("list", "nodes", "--format=json", "--filter", "state=ALIVE")
            nodes = json.loads(told) if told.startswith("[") else []
            kinds = ("train" if "GPU" in node["resources_total"] else "simulate" for node in nodes
                     if "CPU" in node["resources_total"])  # fmt: skip
            return Counter(kinds)

        assert there() == {}
        with cluster.submitted(work(), *command, "--shard-size", "512") as job:
            while job.poll() is None:
                most |= there()
            lines = job.stdout.read().splitlines()
        assert job.returncode == 0, "\n".join(lines)
        wait(lambda: not there())

    assert facts_of(lines)["num_made"] == 79
    assert 2 <= most["simulate"] <= 4  # twice as many each time
    assert most["train"] == 0
