"""What is wrong with a cluster is told before anything is paid for: each fault here is a real one, on a real node."""

import pytest
from raylets import cluster

from raylens import doctor
from raylens.cluster import Node


@pytest.fixture
def other_version(tmp_path) -> str:
    """Where a node finds another numba than this machine has."""
    metadata = tmp_path / "packages" / "numba-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: numba\nVersion: 0.1\n")
    return str(metadata.parent)


def test_a_node_with_another_version_no_credentials_and_a_gpu_that_is_not_there_is_told_of(cli, s3, other_version):
    """Each would end a run after an hour, on the one node of a hundred where it is so."""
    strange = {"PYTHONPATH": other_version, "AWS_SECRET_ACCESS_KEY": "another"}
    with cluster({"num_cpus": 1}, {"num_cpus": 1, "num_gpus": 1, "env_vars": strange}) as (nodes, _):
        ran = cli("doctor", f"{s3}/doctor", RAY_ADDRESS=nodes.address)

    assert ran.returncode == 1
    wrong = {name: found["detail"] for name, found in ran.facts.items() if not found["fine"]}
    assert wrong.keys() == {"versions", "writing", "GPUs"}
    assert "has numba 0.1, and this process 0." in wrong["versions"]
    assert "cannot write there" in wrong["writing"]
    assert "S3 refuses these credentials" in wrong["writing"]
    assert "Ray counts 1 GPUs, and torch sees 0" in wrong["GPUs"]
    assert ran.facts["storage"]["fine"]  # from here it can be written
    assert ran.facts["data"]["detail"].startswith("no node simulates now")


def test_a_cluster_that_takes_jobs_from_strangers_is_told_of(cli):
    """Its owner may have forgotten, and pays for what others compute."""
    with cluster({"num_cpus": 1, "include_dashboard": True}) as (nodes, _):
        ran = cli("doctor", RAY_ADDRESS=nodes.address)

    assert ran.returncode == 1
    assert "(HTTP 200 without a token); start the cluster with RAY_AUTH_MODE=token" in ran.errors[0]
    assert not ran.facts["authentication"]["fine"]


def test_a_cluster_that_does_not_answer_is_told_of_and_no_node_of_it(cli, dead_endpoint):
    """One line, and what could be found out without it."""
    ran = cli("doctor", RAY_ADDRESS=dead_endpoint.removeprefix("http://"))

    assert ran.returncode == 1
    assert [name for name, found in ran.facts.items() if not found["fine"]] == ["Ray"]
    assert "no Ray cluster answers" in ran.errors[0]
    assert "versions" not in ran.facts


@pytest.mark.parametrize(("seconds", "fine"), [(0.2, True), (-30.0, True), (600.0, False), (-600.0, False)])
def test_a_clock_that_is_minutes_apart_is_told_of(seconds, fine):
    """S3 refuses requests that seem a quarter of an hour old."""
    node = Node("10.0.0.2", {"CPU": 1.0}, True, {}, 0, seconds, None)
    found = doctor._try("clocks", lambda: doctor._clocks([node]))

    assert found.fine is fine
    if not fine:
        assert f"that of 10.0.0.2 is {seconds:+.0f} s from this one" in found.detail
