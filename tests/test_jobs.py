"""The entry points for `ray job submit`, on a real cluster that takes jobs."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient
from test_reproduce import TINY

JOBS = Path(__file__).parents[1] / "jobs"
ENDED = {JobStatus.STOPPED, JobStatus.SUCCEEDED, JobStatus.FAILED}


def wait(condition: Callable[[], object], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[JobSubmissionClient]:
    """Of a cluster of one node that `ray start` started."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    start = [
        Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--port=0", "--num-cpus=2",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}",
        f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
    ]  # fmt: skip
    with open(tmp_path_factory.mktemp("ray") / "log", "w") as log:
        head = subprocess.Popen(start, env=environment, stdout=log, stderr=log)
    believed = os.environ.get("RAY_AUTH_MODE")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    try:
        found: list[JobSubmissionClient] = []

        def answers() -> bool:
            try:
                found.append(JobSubmissionClient(address))
                found[-1].list_jobs()
            except (ConnectionError, RuntimeError):
                return False
            return True

        wait(answers)
        yield found[-1]
    finally:
        head.terminate()
        head.wait(60)
        os.environ.pop("RAY_AUTH_MODE") if believed is None else os.environ.update(RAY_AUTH_MODE=believed)


def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(client, tmp_path):
    """A night's work is resumed by the command that began it."""
    recipe, root = tmp_path / "tiny.json", tmp_path / "root"
    recipe.write_text(json.dumps(TINY))
    job = f"{sys.executable} {JOBS / 'reproduce.py'} {recipe} --to {root}"
    environment = {"env_vars": {"RAY_AUTH_MODE": "disabled"}}

    first = client.submit_job(entrypoint=job, runtime_env=environment)
    wait(lambda: list(root.glob("*n-cnn*/model.json")) or client.get_job_status(first) in ENDED)
    client.stop_job(first)
    wait(lambda: client.get_job_status(first) in ENDED)
    assert client.get_job_status(first) == JobStatus.STOPPED, client.get_job_logs(first)
    (trained,) = root.glob("*-n-cnn-*/model.json")
    made = {path: path.stat().st_mtime_ns for path in (trained, *root.glob("*/*.parquet"))}
    assert not (root / "results.json").exists()

    second = client.submit_job(entrypoint=job, runtime_env=environment)
    wait(lambda: client.get_job_status(second) in ENDED)

    assert client.get_job_status(second) == JobStatus.SUCCEEDED, client.get_job_logs(second)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    facts = json.loads(client.get_job_logs(second).splitlines()[-1])
    assert Path(facts["report"]).exists()
