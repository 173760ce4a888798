"""A cluster and an S3 server on this machine: they work, let nobody in, and go without a trace of anything else."""

import http.client
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import local
import pytest
from raylets import descendants, is_loopback, listening, title, wait

RAY = Path(sys.executable).with_name("ray")
# One call of each of Ray's services, by the process that offers it.
CALLS = [
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.InternalKVGcsService/InternalKVGet",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.LogService/ListLogs",
]
METRICS = (200, b"# HELP ")  # how Prometheus's text begins


def ran(*arguments: object) -> subprocess.CompletedProcess:
    """`python cluster/local.py`, by someone whose environment says nothing of Ray or S3."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    return subprocess.run(
        [sys.executable, local.__file__, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=180,
    )  # fmt: skip


def in_shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess:
    """A command in a shell that has sourced what `up` left there."""
    return subprocess.run(
        ["bash", "-c", f"source '{folder}/environment' && {command}"],
        capture_output=True, text=True, env=os.environ | environment, timeout=120,
    )  # fmt: skip


def processes(folder: Path) -> dict[str, int]:
    return {name: pid for name, (pid, _) in json.loads((folder / "processes.json").read_text()).items()}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A head and a worker node that were started by the command."""
    folder = tmp_path_factory.mktemp("local") / "a cluster"  # a blank, as people have in their paths
    up = ran("up", "--workers", 1, "--folder", folder)
    assert up.returncode == 0, up.stderr
    try:
        yield SimpleNamespace(folder=folder, told=up.stdout, pids=processes(folder))
    finally:
        ran("down", "--folder", folder)


def test_the_command_says_how_to_use_what_it_started(cluster):
    """Its last line is what a shell needs, and leads to a cluster whose head takes no work."""
    line = cluster.told.splitlines()[-1].strip()
    ask = "import ray; ray.init(); print(sorted(node['Resources'].get('CPU', 0) for node in ray.nodes()))"
    told = subprocess.run(["bash", "-c", f'{line} && "{sys.executable}" -c "{ask}"'], capture_output=True, text=True)

    assert told.stdout.splitlines()[-1:] == [f"[0, {float(len(os.sched_getaffinity(0)))}]"], told


def test_the_doctor_finds_nothing_wrong_with_it(cluster):
    """Who tries things out here should be told when the real cluster is otherwise."""
    told = in_shell(cluster.folder, f"'{sys.executable}' -m raylens doctor s3://raylens/data")

    assert told.returncode == 0, told.stderr
    facts = json.loads(told.stdout.splitlines()[-1])
    assert facts["nodes"]["detail"].startswith("2 answered")
    assert facts["authentication"]["detail"] == "closed to those without the token"
    assert facts["writing"]["detail"] == "s3://raylens/data can be written from all nodes"
    assert facts["data"]["detail"] == f"{len(os.sched_getaffinity(0))} CPUs on 1 nodes simulate"


def test_nothing_listens_beyond_loopback(cluster):
    """All ports of the nodes, of their workers, and of the server with all that stands behind it."""
    for pid in cluster.pids.values():
        found = listening(pid)
        assert len(found) >= 5, found
        assert {address: who for address, who in found.items() if not is_loopback(address)} == {}


def answer(address: str, path: str) -> tuple[int, bytes] | None:
    """The status and the first bytes of the answer to a bare request; None where nobody speaks HTTP."""
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{address}{path}", timeout=20) as given:
            return given.status, given.read(7)
    except urllib.error.HTTPError as error:
        return error.code, b""
    except (OSError, http.client.BadStatusLine):  # as gRPC's greeting
        return None


def test_whoever_has_no_token_gets_401_wherever_ray_speaks_http(cluster):
    """Who may submit a job may do all that its owner may; what stays open are counters, which can only be read."""
    spoken: dict[str, tuple[int, bytes]] = {}

    def both_nodes_speak() -> bool:
        """Their metrics come seconds after them; the head's own two are there unless another Ray has their ports."""
        found = listening(cluster.pids["keeper"])
        given = {address: answer(address, "/api/jobs/") for address in found}
        spoken.update((address, what) for address, what in given.items() if what)
        return sum(given[address] == METRICS for address, who in found.items() if who == {"ray::DashboardAgent"}) == 2

    wait(both_nodes_speak)

    closed = {address for address, (status, _) in spoken.items() if status == 401}
    metrics = {address for address, found in spoken.items() if found == METRICS}
    assert spoken.keys() == closed | metrics, spoken
    assert len(closed) >= 5  # the dashboard; of each node the agent and the agent of environments
    (page,) = (address for address in closed if answer(address, "/") != (401, b""))
    assert answer(page, "/") == (200, b"<!docty")  # the page that asks for the token


def test_whoever_has_no_token_is_refused_wherever_ray_speaks_grpc(cluster):
    """Its ports are as good as a login; none of its services answers without the token, and all do with it."""
    token = [("authorization", f"Bearer {(cluster.folder / 'token').read_text()}")]
    asked = [
        address for address in listening(cluster.pids["keeper"])
        if answer(address, "/") is None
    ]  # fmt: skip

    def outcome(address: str, call: str, metadata: list | None) -> str:
        with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                channel.unary_unary(call)(b"", timeout=20, metadata=metadata)
            except grpc.RpcError as error:
                return error.code().name
        return "OK"

    without = {(address, call): outcome(address, call, None) for address in asked for call in CALLS}
    offered = {place for place, found in without.items() if found != "UNIMPLEMENTED"}
    assert {call for _, call in offered} == set(CALLS)  # each of them is somewhere
    assert {without[place] for place in offered} == {"UNAUTHENTICATED"}
    assert "UNAUTHENTICATED" not in {outcome(*place, token) for place in offered}


def test_whoever_has_no_keys_gets_nothing_from_the_server(cluster):
    """Neither by S3 nor at the doors behind it, where the same bytes lie."""
    given = {address: answer(address, "/raylens/") for address in listening(cluster.pids["server"])}
    spoken = {address: found[0] for address, found in given.items() if found}

    assert len(spoken) == 5, spoken  # S3, and SeaweedFS's master, volume, filer and admin servers
    assert set(spoken.values()) <= {401, 403, 404}, spoken
    assert 403 in spoken.values()  # S3 knows the bucket, and says no more


@pytest.mark.parametrize("mode", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "another"}], ids=["none", "wrong"])
def test_a_job_without_the_token_is_refused(cluster, mode):
    """The command that a stranger would try."""
    told = in_shell(
        cluster.folder, f"{' '.join(f'export {name}={value};' for name, value in mode.items())}"
        f"'{RAY}' job submit --no-wait -- echo in",
    )  # fmt: skip

    assert told.returncode != 0
    assert "uthentication" in told.stderr + told.stdout, told


def test_its_secrets_are_for_its_user_alone(cluster):
    """The token is as good as a login, on a machine that others may share."""
    inside = [path for path in cluster.folder.iterdir() if path.name in ("token", "environment")]

    assert len(inside) == 2
    assert {path.stat().st_mode & 0o777 for path in inside} == {0o600}
    assert cluster.folder.stat().st_mode & 0o777 == 0o700
    for pid in (*cluster.pids.values(), *descendants(cluster.pids["keeper"])):
        told = Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else b""
        assert (cluster.folder / "token").read_bytes() not in told  # anyone may read how a process was called


def test_a_second_cluster_in_the_same_folder_is_refused(cluster):
    """The first would be left without a record, and nobody could end it."""
    again = ran("up", "--folder", cluster.folder)

    assert again.returncode == 1
    assert again.stderr.startswith(f"error: a cluster is up in {cluster.folder}. End it with ")
    assert processes(cluster.folder) == cluster.pids


def test_down_ends_what_up_started_and_nothing_else(cluster, tmp_path):
    """Neither another cluster, nor whoever has got the number of a process of ours; what is in the bucket stays."""
    folder = tmp_path / "mine"
    assert ran("up", "--workers", "1", "--folder", folder).returncode == 0
    write = "import sys; from raylens import storage; storage.write(sys.argv[1], b'kept')"
    assert in_shell(folder, f"'{sys.executable}' -c \"{write}\" s3://raylens/kept").returncode == 0
    mine = {pid: who for one in processes(folder).values() for pid in (one, *descendants(one))
            if (who := local._began(pid))}  # fmt: skip
    record = folder / "processes.json"
    with subprocess.Popen(["sleep", "600"]) as bystander:
        # As after a restart of the machine: a number is on record that is someone else's now.
        record.write_text(json.dumps(json.loads(record.read_text()) | {"ours": [bystander.pid, "0"]}))
        down = ran("down", "--folder", folder)

        assert bystander.poll() is None
        bystander.send_signal(signal.SIGKILL)
    assert down.returncode == 0, down.stderr
    assert {pid for pid, began in mine.items() if local._began(pid) == began} == set()
    assert in_shell(cluster.folder, f"'{RAY}' status").returncode == 0  # the other one lives
    assert not (folder / "token").exists()
    again = ran("down", "--folder", folder)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert again.stderr.startswith(f"error: no cluster is up in {folder}")

    assert ran("up", "--workers", "1", "--folder", folder).returncode == 0
    read = "import sys; from raylens import storage; print(storage.read(sys.argv[1]))"
    told = in_shell(folder, f"'{sys.executable}' -c \"{read}\" s3://raylens/kept")
    assert ran("down", "--folder", folder).returncode == 0
    assert told.stdout.strip() == "b'kept'", told.stderr


def test_an_up_that_fails_leaves_nothing_behind(tmp_path):
    """The server runs by then, and nobody would know of it."""
    folder = tmp_path / "mine"
    (folder / "log").mkdir(parents=True)  # where the log of the nodes would go

    up = ran("up", "--folder", folder)

    assert up.returncode == 1
    assert [path for path in Path("/proc").glob("[0-9]*") if str(folder) in title(int(path.name))] == []
    assert not (folder / "processes.json").exists()
    assert not (folder / "token").exists()
