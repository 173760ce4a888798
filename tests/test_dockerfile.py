"""The images of cluster/Dockerfile: what a linter holds, what it does not, and what their steps for Python make."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import DOCKERFILE, IGNORED, ROOT, Instruction, is_ignored, lineage, sources, stages

from raylens import __version__

pytestmark = pytest.mark.timeout(1800)  # where torch's build for CUDA comes over a slow network

TARGETS = ("cpu", "cuda")
AT_RUN_TIME = {"wget", "openssh-client", "rsync"}  # the first for probes on Kubernetes, the others for `ray up`
# Torch for CUDA names the versions of what it brings along.
WITH_TORCH = re.compile(r"nvidia-|cuda-|triton")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    return {canonical(name): version for name, version in lines}


# --- the text


def test_hadolint_finds_nothing():
    """It knows what has gone wrong in the Dockerfiles of others, and shellcheck reads each RUN with it."""
    hadolint = Path(sys.executable).with_name("hadolint")
    found = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True)

    assert found.stdout == ""
    assert found.returncode == 0


def faults(text: str) -> Iterator[str]:
    """What is wrong with a Dockerfile that the linter lets pass."""
    known = stages(text)
    for stage in known.values():
        if stage.base not in known and not re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-slim-[a-z]+", stage.base):
            yield f"{stage.base}: another image tomorrow, or one with compilers"
        for step in stage.instructions:
            yield from step_faults(step)
    if "https://" in text or "http://" in text:
        yield "a registry that only its builder knows"
    for target in TARGETS:
        yield from (f"{target}: {fault}" for fault in target_faults(lineage(known, target)))


def step_faults(step: Instruction) -> Iterator[str]:
    if step.keyword in ("ENV", "ARG", "LABEL"):
        for name in step.pairs:
            if re.search("SECRET|TOKEN|PASSWORD|CREDENTIAL|_KEY", name.upper()):
                yield f"a secret in the image's history: {name}"
    if step.keyword == "COPY" and "from" not in step.flags:
        for source in step.text.split()[:-1]:
            if not (ROOT / source).exists():
                yield f"COPY of {source}, which is not there"
            elif not sources(source):
                yield f"COPY of {source}, which .dockerignore keeps out"
    if step.keyword == "RUN" and "pip install" in step.text and not re.search("--constraint|--no-index", step.text):
        yield "pip takes what is newest"


def target_faults(steps: list[Instruction]) -> Iterator[str]:
    users = [step.text for step in steps if step.keyword == "USER"]
    if users[-1:] != ["1000:1000"]:
        yield "runs as root, or as a user whom the manifests do not know"
    commands = [command.split() for step in steps if step.keyword == "RUN" for command in step.text.split("&&")]
    for command in commands:
        if command[:2] == ["apt-get", "install"]:
            packages = {word for word in command[2:] if not word.startswith("-")}
            if packages - AT_RUN_TIME:
                yield f"carries what nothing needs at run time: {packages - AT_RUN_TIME}"
    labels: dict[str, str] = {}
    for step in steps:
        labels |= step.pairs if step.keyword == "LABEL" else {}
    if labels.get("org.opencontainers.image.version") != __version__:
        yield "label of another version"
    if labels.get("org.opencontainers.image.licenses") != "BSD-3-Clause":
        yield "label of another licence"


def test_the_dockerfile_is_as_it_should_be():
    """What keeps images small, reproducible and without power or secrets."""
    assert list(faults(DOCKERFILE.read_text())) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("python:3.11.14-slim-trixie", "python:3.11", "another image tomorrow"),
        ("python:3.11.14-slim-trixie", "python", "another image tomorrow"),
        ("python:3.11.14-slim-trixie", "python:3.11.14-trixie", "with compilers"),
        ("rsync wget", "rsync wget g++", "cuda: carries what nothing needs"),
        ("FROM node AS cuda", "FROM packages AS cuda", "cuda: runs as root"),
        ("USER 1000:1000", "USER 0", "cpu: runs as root"),
        ("USER 1000:1000", "", "cpu: runs as root"),
        ('ARG TORCH_INDEX=""', 'ARG INDEX_PASSWORD=""', "a secret in the image's history"),
        ("RAY_USAGE_STATS_ENABLED=0", "AWS_SECRET_ACCESS_KEY=x", "a secret in the image's history"),
        ('ARG TORCH_INDEX=""', 'ARG TORCH_INDEX="https://wheels.example.org"', "a registry"),
        ("COPY jobs ", "COPY job ", "COPY of job, which is not there"),
        ("COPY jobs ", "COPY tests ", "COPY of tests, which .dockerignore keeps out"),
        ("--constraint constraints.txt --requirement", "--requirement", "pip takes what is newest"),
        (f'version="{__version__}"', 'version="0.0.9"', "label of another version"),
    ],
)
def test_the_rules_see_what_breaks_them(before, after, fault):
    """A rule that lets all pass holds nothing."""
    text = DOCKERFILE.read_text()
    assert before in text

    broken = list(faults(text.replace(before, after)))

    assert any(fault in found for found in broken), broken


@pytest.mark.parametrize(
    "path",
    [".git/config", ".venv/bin/python", "local-cluster/auth_token", "my-recipe.toml", ".env", "tests/conftest.py",
     "cluster/local.py", "data/part-00000.parquet", "raylens/__pycache__/cli.pyc", "jobs/__pycache__/train.pyc"],
)  # fmt: skip
def test_what_the_images_do_not_need_stays_at_home(path):
    """Else a token or a dataset would travel to the engine, and a COPY that is meant well would ship it."""
    assert is_ignored(path, IGNORED.read_text())
    assert not is_ignored("raylens/physics/render.py", IGNORED.read_text())


# --- what its steps make


def test_every_version_is_the_one_that_is_pinned(image):
    """Nodes that differ in a version differ in what they compute, or do not understand each other."""
    listed = json.loads(image.run("python", "-m", "pip", "list", "--format", "json").stdout)
    versions = {canonical(one["name"]): one["version"] for one in listed}
    del versions["pip"], versions["raylens"]

    wrong = {name: version for name, version in versions.items() if not WITH_TORCH.match(name)
             and version.partition("+")[0] != pins().get(name)}  # fmt: skip
    assert wrong == {}
    assert "ray" in versions
    assert image.run("python", "-m", "pip", "check").stdout == "No broken requirements found.\n"


def test_its_user_simulates_and_can_change_nothing_but_its_home(image):
    """As a pod does; numba keeps there what it has compiled, so that the next process need not."""
    arguments = ("smoke", "--to", "data", "--num-images", "8", "--shard-size", "4")
    written = image.run("touch", image.moved("/opt/raylens/bin/python-of-mine"))

    ran = image.run("raylens", "simulate", *arguments)

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["num_made"] == 2
    assert written.returncode != 0
    home = image.root / "home/ray"
    assert any(path.match("render._trace-*.nbc") for path in (home / ".cache/numba").rglob("*"))


def test_jobs_lie_where_the_manifests_look(image):
    """A path that is wrong is found out after the nodes have come and are paid for."""
    manifests = [path.read_text() for path in (ROOT / "cluster").rglob("*.yaml")]
    scripts = {script for text in manifests for script in re.findall(r"/home/ray/\S+?\.py", text)}

    assert len(scripts) == 4
    for script in scripts:
        assert image.run("python", image.moved(script), "--help").returncode == 0


def test_it_has_what_kuberay_and_ray_up_call(image):
    """They write these commands, and run the autoscaler, which starts nodes, from the same image."""
    autoscalers = "ray.autoscaler._private.kuberay.run_autoscaler, ray.autoscaler._private.aws.node_provider"
    ran = image.run("python", "-c", f"import {autoscalers}, ray.scripts.scripts as ray; print(*ray.cli.commands)")

    assert ran.returncode == 0, ran.stderr
    assert {"kuberay-autoscaler", "health-check", "start", "stop"} <= set(ran.stdout.split())
    assert image.run("ray", "--version").stdout == f"ray, version {pins()['ray']}\n"
    told = dict(pair for step in lineage(stages(DOCKERFILE.read_text()), "cpu") if step.keyword == "ENV"
                for pair in step.pairs.items())  # fmt: skip
    assert told["HOME"] == "/home/ray"  # else `ray up` takes it for /root


def test_an_image_with_the_other_torch_is_not_built(image):
    """Gigabytes that CPUs cannot use; or GPUs that are paid for and not used, as training falls back to CPUs."""
    known = stages(DOCKERFILE.read_text())
    built = [image.run("sh", "-c", known[target].instructions[-1].text) for target in TARGETS]

    right, wrong = sorted(built, key=lambda one: one.returncode)
    assert (right.returncode, right.stderr) == (0, "")
    assert wrong.returncode == 1
    assert re.fullmatch(r"The image for .* needs torch .*TORCH_INDEX.*\n", wrong.stderr)


def test_an_index_for_torch_is_asked_for_torch_alone():
    """Whoever holds that index could else serve any package under its name."""
    steps = [step.text for step in stages(DOCKERFILE.read_text())["packages"].instructions if "pip" in step.text]
    (asks,) = [text for text in steps if "index-url" in text]

    echo = ["sh", "-c", asks.replace("python -m pip", "echo")]
    given = subprocess.run(echo, capture_output=True, text=True, env={"TORCH_INDEX": "X"}).stdout
    not_given = subprocess.run(echo, capture_output=True, text=True, env={"TORCH_INDEX": ""}).stdout

    assert given.endswith(" --no-deps --index-url X torch\n")
    assert not_given.endswith(" --no-deps torch\n")
    assert len(steps) == 2  # the other one takes what torch needs, and all else
