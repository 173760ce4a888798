"""What the tests share: one local Ray, one real S3 server, the command line, tiny datasets without Ray, and an image.

Ray comes after S3, because its workers have the environment in which it was started.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import images
import local
import pytest
import s3fs

from raylens import card, dataset, shards
from raylens.config import Simulation
from raylens.simulate import simulate_block

# What the tests say of CPUs should hold on any machine; Ray, here and in subprocesses, believes this.
os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": 2})
os.environ.pop("RAY_ADDRESS", None)  # the tests join no cluster that happens to run


@pytest.fixture(scope="session")
def s3(tmp_path_factory) -> Iterator[str]:
    """A bucket on a SeaweedFS of our own, and the AWS_* variables that lead to it."""
    folder = tmp_path_factory.mktemp("s3")
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{local.free_ports(1)[0]}",
        "AWS_ACCESS_KEY_ID": "raylens-tests",
        "AWS_SECRET_ACCESS_KEY": f"planted-secret-{uuid.uuid4().hex}",  # to be found wherever it should not be
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    with local.start_s3(folder, "bucket", environment) as server:
        try:
            local.await_bucket("bucket", server, folder)
            yield "s3://bucket"
        finally:
            server.kill()  # its data are thrown away, and it would take ten seconds to go
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def surroundings(s3, monkeypatch, tmp_path_factory) -> Iterator[Callable[..., None]]:
    """Another S3, or other credentials, for one test; file systems remember theirs, so they are forgotten."""
    nowhere = str(tmp_path_factory.mktemp("no-credentials") / "file")
    monkeypatch.setenv("AWS_CONFIG_FILE", nowhere)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", nowhere)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def change(**variables: str | None) -> None:
        for name, value in variables.items():
            monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    yield change
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def dead_endpoint() -> str:
    """Where nobody listens."""
    return f"http://127.0.0.1:{local.free_ports(1)[0]}"


@pytest.fixture(scope="session")
def ray_cluster(s3) -> Iterator[Any]:
    """A local Ray of two CPUs, started as the library starts it; its workers reach the S3 server."""
    import ray

    from raylens import cluster

    yield cluster.connect()
    ray.shutdown()


@dataclass(frozen=True)
class Ran:
    """What a command line left behind."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def facts(self) -> dict[str, Any]:
        """The JSON object on the last line."""
        return json.loads(self.stdout.splitlines()[-1])

    @property
    def errors(self) -> list[str]:
        """The lines that say what failed."""
        return [line for line in self.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ran]:
    """`python -m raylens ...` in a process of its own."""

    def run(*arguments: str, timeout: float = 180, **environment: str) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "raylens", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | environment,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def main(capsys) -> Callable[..., Ran]:
    """The command line in this process: what needs no Ray of its own takes milliseconds."""
    from raylens import cli as command_line

    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        status = command_line.main(list(arguments))
        return Ran(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny() -> Simulation:
    """A simulation whose images cost next to nothing: 8 x 8 pixels, few subhaloes."""
    return Simulation().override({"camera.num_pixels": 8, "camera.pixel_scale": 0.75, "subhalos.mass_min": 5e9})


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., str]:
    """Make a complete dataset without Ray, and return its URI; with a card, which takes as long as all else."""

    def make(
        root: Path | str, simulation: Simulation, num_images: int = 10, shard_size: int = 4, split: str = "train",
        with_card: bool = False,
    ) -> str:  # fmt: skip
        uri = dataset.location(str(root), recipe="tiny", split=split, simulation=simulation)
        plan = dataset.plan_for(
            uri, recipe="tiny", split=split, simulation=simulation, num_images=num_images, shard_size=shard_size
        )
        dataset.begin(uri, plan)
        found = []
        for number in range(plan.num_shards):
            table = shards.to_table(simulate_block(simulation, plan.rows(number), split), simulation)
            content = shards.encode(table, simulation, split, "any")
            found.append(dataset.place_shard(uri, plan, number, content, None)[0])
        entries = [shard.entry for shard in found]
        if with_card:
            parts = [shard.provenance.statistics for shard in found]
            whole = {name: reduce(add, (part[name] for part in parts)) for name in parts[0]}
            card.write(uri, plan, entries, whole, {"any"})
        dataset.finish(uri, plan, entries, {"any"})
        return uri

    return make


@pytest.fixture(scope="session")
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """A disk on which no file can grow beyond some bytes, while the body runs."""

    @contextmanager
    def limit(num_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def undrawn(request, monkeypatch) -> None:
    """Leave out the pixels of the figures of a page, which take seconds, unless a test asks for `drawn`."""
    if "drawn" not in request.fixturenames:
        from raylens import figures

        monkeypatch.setattr(figures, "data_uri", lambda figure: "data:image/svg+xml;base64,")


@pytest.fixture
def drawn() -> None:
    """Asked for by a test that is about the figures."""


@pytest.fixture(scope="session")
def image(tmp_path_factory) -> Iterator[images.Image]:
    """What the stage `node` of the Dockerfile is, from which what is shipped differs by a check; it takes a minute."""
    root = tmp_path_factory.mktemp("image")
    yield images.make(root, "node")
    subprocess.run(["chmod", "-R", "u+w", root], check=True)
    subprocess.run(["rm", "-rf", root], check=True)  # gigabytes, where pytest keeps the folders of three sessions
