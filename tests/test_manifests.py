"""The manifests for Kubernetes: what KubeRay's schemas hold, and what they do not."""

import copy
import itertools
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raylens import __version__

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "cluster" / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "kuberay"
DRAIN_SECONDS = 30  # Ray's RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S
JOBS = sorted((KUBERAY / "jobs").glob("*.yaml"))


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read(KUBERAY / "base" / "raycluster.yaml")


@pytest.fixture(scope="module")
def rendered() -> list[dict[str, Any]]:
    """What the example's overlay makes of the base."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which brings kustomize, is not installed; the files of the base are checked without")
    overlay = KUBERAY / "overlays" / "example"
    made = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(made.stdout))


def groups(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    spec = cluster["spec"]
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: group["template"]["spec"] for name, group in groups(cluster).items()}


def amount(quantity: str) -> float:
    """A number of CPUs or bytes as Kubernetes writes it."""
    value, unit = re.fullmatch(r"([\d.]+)(\D*)", str(quantity)).groups()
    return float(value) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def faults(cluster: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a RayCluster that the schema lets pass."""
    spec = cluster["spec"]
    name = cluster["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 50:
        yield "name: of its Services and pods it is the beginning, and those have 63 letters at most"
    if f"ray=={spec.get('rayVersion')}" not in (ROOT / "constraints.txt").read_text().replace("[", " ").split():
        yield "rayVersion: not the one that is pinned"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "authOptions: whoever reaches it may submit"
    if not spec.get("enableInTreeAutoscaling"):
        yield "autoscaling: off"
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        yield "head: takes work"
    for group in spec["workerGroupSpecs"]:
        if not 0 <= group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas"
        if group["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{group['groupName']}: a worker that restarts in its pod is a node that Ray does not know"
    head, *others = (pod["serviceAccountName"] for pod in pods(cluster).values())
    if head in others:
        yield "accounts: the operator lets that of the head change the cluster, and a node has it too"
    mounts = spec.get("autoscalerOptions", {}).get("volumeMounts", [])
    if [mount["name"] for mount in mounts if mount["mountPath"] == "/tmp/ray"] != ["ray"]:
        yield "autoscaler: its log is not where the head looks for it"
    for group, pod in pods(cluster).items():
        yield from (f"{group}: {fault}" for fault in pod_faults(group, pod, groups(cluster)[group]["template"]))


def pod_faults(group: str, pod: dict[str, Any], template: dict[str, Any]) -> Iterator[str]:
    on_spot = pod.get("nodeSelector", {}).get("raylens/spot") == "true"
    if on_spot != (group == "simulate"):
        yield "spot is for simulation alone"
    if not on_spot and "raylens/spot" not in json.dumps(pod.get("affinity", {})):
        yield "nothing keeps it off spot nodes"
    if pod.get("terminationGracePeriodSeconds", 30) <= DRAIN_SECONDS:
        yield "it is killed while Ray drains it"
    context = pod.get("securityContext", {})
    if not (context.get("runAsNonRoot") and context.get("seccompProfile") == {"type": "RuntimeDefault"}):
        yield "securityContext of the pod"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    node = {key.removeprefix("raylens/node-"): amount(value)
            for key, value in template["metadata"]["annotations"].items()}  # fmt: skip
    for container in pod["containers"]:
        confined = container.get("securityContext", {})
        if confined.get("allowPrivilegeEscalation") is not False or confined.get("capabilities") != {"drop": ["ALL"]}:
            yield "securityContext of the container"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "local_raylet_healthz" not in json.dumps(container.get(probe, {})):
                yield f"no {probe}"
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        for kind, key in (("cpu", "cpu"), ("memory", "memory"), ("gpu", "nvidia.com/gpu")):
            asked = amount(requests.get(key, "0"))
            if asked > node.get(kind, 0) * (1 if kind == "gpu" else 0.95):
                yield f"{key} does not fit the node, with what the system takes"
            if key in limits and amount(limits[key]) < asked:
                yield f"limit of {key} below what it asks for"
        if requests["memory"] != limits.get("memory"):
            yield "memory without a limit takes that of others"
        if ("nvidia.com/gpu" in limits) != (group == "train"):
            yield "GPUs are for training alone"
        for variable in container.get("env", []):
            if re.search("SECRET|TOKEN|PASSWORD|KEY", variable["name"]) and "value" in variable:
                yield f"a secret in the manifest: {variable['name']}"
        if missing := {mount["name"] for mount in container.get("volumeMounts", [])} - volumes:
            yield f"volumes that are not there: {missing}"


def test_the_cluster_is_as_it_should_be(cluster):
    """As it stands, where nobody has to have kustomize."""
    assert list(faults(cluster)) == []


def test_the_cluster_of_the_example_is_as_it_should_be(rendered):
    """An overlay that takes a rule away with a patch would be copied."""
    (made,) = (manifest for manifest in rendered if manifest["kind"] == "RayCluster")

    assert list(faults(made)) == []


HEAD = ["spec", "headGroupSpec", "template", "spec"]
SIMULATE = ["spec", "workerGroupSpecs", 0]
TRAIN = ["spec", "workerGroupSpecs", 1]


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (["metadata", "name"], "x" * 51, "name"),
        (["metadata", "name"], "Raylens", "name"),
        (["spec", "rayVersion"], "2.59.0", "rayVersion"),
        (["spec", "authOptions"], {}, "authOptions"),
        (["spec", "headGroupSpec", "rayStartParams"], {}, "head: takes work"),
        (["spec", "autoscalerOptions"], {}, "autoscaler: its log"),
        ([*TRAIN, "template", "spec", "serviceAccountName"], "raylens-head", "accounts"),
        ([*SIMULATE, "maxReplicas"], -1, "minReplicas"),
        ([*TRAIN, "template", "spec", "restartPolicy"], "Always", "restarts in its pod"),
        ([*TRAIN, "template", "spec", "nodeSelector"], {"raylens/spot": "true"}, "spot is for simulation"),
        ([*HEAD, "affinity"], {}, "off spot"),
        ([*HEAD, "terminationGracePeriodSeconds"], 30, "killed while"),
        ([*HEAD, "securityContext", "runAsNonRoot"], False, "securityContext"),
        ([*HEAD, "containers", 0, "securityContext"], {}, "securityContext"),
        ([*HEAD, "containers", 0, "livenessProbe"], {}, "no livenessProbe"),
        ([*HEAD, "containers", 0, "resources", "requests", "cpu"], "4", "does not fit"),
        ([*SIMULATE, "template", "spec", "containers", 0, "resources", "requests", "memory"], "32Gi", "does not fit"),
        ([*TRAIN, "template", "spec", "containers", 0, "resources", "limits", "nvidia.com/gpu"], "0", "below"),
        ([*HEAD, "containers", 0, "env"], [{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}], "a secret"),
        ([*HEAD, "volumes"], [], "volumes that are not there"),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value)[:20],
)  # fmt: skip
def test_the_rules_see_what_breaks_them(cluster, place, value, fault):
    """A rule that lets all pass holds nothing."""
    broken = copy.deepcopy(cluster)  # anchors make parts of it the same
    broken = json.loads(json.dumps(broken))
    *way, last = place
    at = broken
    for key in way:
        at = at[key]
    at[last] = value

    assert any(fault in found for found in faults(broken)), list(faults(broken))


@pytest.fixture
def validate() -> Callable[[dict[str, Any]], None]:
    """Check a manifest against the schema of its kind."""
    if not SCHEMAS.is_dir():
        pytest.skip("KubeRay's CRD schemas are not at hand (shared/kuberay beside the repository)")

    def check(manifest: dict[str, Any]) -> None:
        jsonschema.validate(manifest, json.loads((SCHEMAS / f"{manifest['kind'].lower()}.schema.json").read_text()))

    return check


def test_kuberays_schemas_know_every_key(validate, cluster):
    """A key that is misspelt is dropped without a word, and what it protects with it."""
    manifests = [cluster, *map(read, JOBS)]
    for manifest in manifests:
        validate(manifest)

    assert len(manifests) == 5
    cluster["spec"]["authOption"] = cluster["spec"].pop("authOptions")
    with pytest.raises(jsonschema.ValidationError, match="authOption"):
        validate(cluster)


def test_kuberays_schemas_know_every_key_of_the_example(validate, rendered):
    """A patch can misspell one too."""
    (made,) = (manifest for manifest in rendered if manifest["kind"] == "RayCluster")

    validate(made)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_runs_what_is_in_the_image_on_the_cluster_that_stands(path, cluster):
    """Its command line is understood, and needs nothing but what the cluster's pods have."""
    from typer.main import get_command

    from raylens.cli import app

    job = read(path)
    python, script, *words = shlex.split(job["spec"]["entrypoint"])

    assert job["metadata"]["name"] == path.stem
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["spec"]["submissionMode"] == "HTTPMode"  # else a pod that the network policy does not know submits
    assert "submitterPodTemplate" not in job["spec"]
    assert python == "python"
    assert (ROOT / "jobs" / Path(script).name).exists()
    assert Path(script).parent == Path("/home/ray/jobs")
    assert Path(script).stem == path.stem
    verb = get_command(app).commands[path.stem]
    with verb.make_context(path.stem, words) as context:
        assert "$RAYLENS_ROOT/" in str(context.params)


def test_a_job_finds_what_another_has_made(cluster):
    """Each names its places in its own file, and the images of a search must fit the shared memory of a pod."""
    from raylens import dataset, recipes, tune

    root = "s3://bucket/root"
    told = {path.stem: read(path)["spec"]["entrypoint"].replace("$RAYLENS_ROOT", root) for path in JOBS}
    words = {name: shlex.split(entrypoint)[2:] for name, entrypoint in told.items()}
    after = {name: dict(itertools.pairwise(given)) for name, given in words.items()}
    paper = recipes.load("paper-fixed")

    def made(root: str) -> str:
        return dataset.location(root, recipe="paper-fixed", split="train", simulation=paper.simulation)

    assert after["train"]["--data"] == made(after["simulate"]["--to"])
    assert after["tune"]["--data"] == made(f"{after['reproduce']['--to']}/paper-fixed")
    assert "paper-fixed" in words["reproduce"]
    shared = min(
        amount(volume["emptyDir"]["sizeLimit"])
        for pod in pods(cluster).values() for volume in pod["volumes"] if volume["name"] == "shared-memory"
    )  # fmt: skip
    pixels = 4 * paper.simulation.camera.num_pixels**2 * paper.num_images.of("train")
    assert pixels < tune._SHARE_OF_OBJECT_STORE * 0.9 * shared  # of which Ray takes a little less


def test_the_overlay_sets_all_that_is_ones_own(rendered):
    """Image, bucket, role and sizes in one file, and nothing left of what stood there before."""
    by_kind = {manifest["kind"]: manifest for manifest in rendered}
    cluster = by_kind["RayCluster"]
    images = {name: pod["containers"][0]["image"] for name, pod in pods(cluster).items()}

    accounts = [one["metadata"] for one in rendered if one["kind"] == "ServiceAccount"]

    assert by_kind.keys() == {"ServiceAccount", "ConfigMap", "NetworkPolicy", "RayCluster"}
    assert images["head"] == images["simulate"]
    assert {image.rpartition(":")[2] for image in images.values()} == {__version__}
    assert by_kind["ConfigMap"]["data"]["RAYLENS_ROOT"].startswith("s3://")
    assert {manifest["metadata"]["namespace"] for manifest in rendered} == {"raylens"}
    assert {one["name"] for one in accounts} == {pod["serviceAccountName"] for pod in pods(cluster).values()}
    assert all("role" in str(one["annotations"]) for one in accounts)
    for pod in pods(cluster).values():
        config, secret = pod["containers"][0]["envFrom"]
        assert config["configMapRef"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]
        assert secret["secretRef"]["optional"] is True
    assert "Secret" not in by_kind  # it is made by hand, and in no file


def test_the_network_policy_lets_in_the_cluster_and_its_operator_alone(cluster):
    """All ports for its own pods, the dashboard for the operator, nothing for anybody else."""
    policy = read(KUBERAY / "base" / "networkpolicy.yaml")["spec"]
    own = {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}
    among_themselves, operator = policy["ingress"]

    assert policy["podSelector"] == own
    assert policy["policyTypes"] == ["Ingress"]
    assert among_themselves == {"from": [{"podSelector": own}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    (source,) = operator["from"]
    assert source["podSelector"] == {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}}
    # In its namespace alone: a label, anybody can give a pod of his own.
    assert source["namespaceSelector"]["matchLabels"].keys() == {"kubernetes.io/metadata.name"}


def test_what_the_overlay_offers_works_when_its_sign_is_taken_away(rendered, tmp_path):
    """Patches that nobody tries are misspelt, and kustomize refuses all for one."""
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    overlay = tmp_path / "kuberay" / "overlays" / "example"
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().replace("# - {op:", "- {op:"))

    made = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True).stdout

    (cluster,) = (one for one in yaml.safe_load_all(made) if one["kind"] == "RayCluster")
    simulate = groups(cluster)["simulate"]["template"]
    assert simulate["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "30"
    places = [pod.get("affinity", pod.get("nodeSelector")) for pod in pods(cluster).values()]
    assert "raylens/spot" not in json.dumps(places)
    assert not any("fit" in fault for fault in faults(cluster))


def test_the_network_policy_of_the_how_to_is_one():
    """Who copies it should let Prometheus in, and nobody else."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "how-to" / "kubernetes.md").read_text(), re.DOTALL)
    policy = yaml.safe_load(text)

    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8080}]


def test_the_dashboard_shows_what_raylens_exports():
    """A panel of a metric that nobody writes stays empty for ever."""
    from raylens.cluster import METRICS

    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    told = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])

    assert set(re.findall(r"ray_raylens_(\w+)", told)) == METRICS.keys()


def test_the_dashboards_panels_stand_beside_each_other():
    """Grafana moves what overlaps to where nobody has put it."""
    places = [panel["gridPos"] for panel in json.loads((ROOT / "cluster" / "grafana.json").read_text())["panels"]]
    rows = {at["y"]: [one for one in places if one["y"] == at["y"]] for at in places}

    assert list(rows) == [8 * number for number in range(len(rows))]
    for row in rows.values():
        assert [at["x"] for at in row] == [sum(before["w"] for before in row[:k]) for k in range(len(row))]
        assert sum(at["w"] for at in row) == 24
        assert {at["h"] for at in row} == {8}
