"""The cluster on AWS: what Ray's launcher makes of `cluster/aws.yaml`, what AWS would make of that, and what Ray does
with its commands."""

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import local
import pytest
import yaml

# `ray up` checks a file only on its way to an account. These are its steps before, and have no public names.
from ray.autoscaler._private.command_runner import _with_environment_variables
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from raylets import is_loopback, listening
from test_jobs import wait
from test_local import answer

from raylens import __version__

ROOT = Path(__file__).parents[1]
FILE = ROOT / "cluster" / "aws.yaml"
HOW_TO = ROOT / "docs" / "how-to" / "cluster.md"
PLACES = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The file with Ray's defaults, as `ray up` takes it; free of YAML's anchors, which make parts of it the same."""
    made = prepare_config(yaml.safe_load(FILE.read_text()))
    validate_config(made)
    return json.loads(json.dumps(made))


def faults(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a cluster that Ray's schema lets pass."""
    nodes = config["available_node_types"]
    head = nodes[config["head_node_type"]]
    region, docker = config["provider"]["region"], config["docker"]
    if config["provider"].get("cache_stopped_nodes", True):
        yield "a node that is let go is stopped, and its disk costs on"
    if head["resources"].get("CPU") != 0 or head["max_workers"] != 0:
        yield "head: takes work"
    if config["max_workers"] < sum(node["max_workers"] for node in nodes.values()):
        yield "max_workers: less than those of the nodes together"
    if not {f"--env=AWS_REGION={region}", "--env=RAY_AUTH_MODE=token"} <= set(docker["run_options"]):
        yield "docker: region or authentication"
    if not {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(docker["run_options"]):
        yield "docker: not confined"
    for name, node in nodes.items():
        yield from (f"{name}: {fault}" for fault in node_faults(name, node, head))
        image = AutoscalingConfig(config, skip_content_hash=True).get_docker_config(name)["image"]
        if not image.endswith(f"/raylens{'-cuda' if node['resources'].get('GPU') else ''}:{__version__}"):
            yield f"{name}: another image: {image}"
    yield from command_faults(config)
    for text in strings(config):
        if re.search(r"AKIA|RAY_AUTH_TOKEN=|SECRET|PASSWORD|PRIVATE KEY|(?i:aws_credentials)", text):
            yield f"a secret in the file: {text}"


def node_faults(name: str, node: dict[str, Any], head: dict[str, Any]) -> Iterator[str]:
    machine, has_gpu = node["node_config"], bool(node["resources"].get("GPU"))
    if node["min_workers"] != 0 or node["max_workers"] < 0:
        yield "costs while nobody works"
    if (machine.get("InstanceMarketOptions") == {"MarketType": "spot"}) != (name == "simulate"):
        yield "spot is for simulation alone"
    if node.get("labels", {}).get("raylens.simulate") != {"simulate": "yes", "train": "no"}.get(name):
        yield "label: does not say whether it simulates"
    if has_gpu != (name == "train") or has_gpu != (
        "--gpus=all" in node.get("docker", {}).get("worker_run_options", [])
    ):
        yield "GPUs are for training alone, and for all of it"
    if not machine.get("IamInstanceProfile"):
        yield "IamInstanceProfile: no role"
    elif node is not head and machine["IamInstanceProfile"] == head["node_config"].get("IamInstanceProfile"):
        yield "IamInstanceProfile: may start nodes"
    if not machine.get("SecurityGroupIds"):
        yield "SecurityGroupIds: the launcher would make one that opens SSH to the world"
    if not machine.get("ImageId"):
        yield "ImageId: the launcher would take one of years ago"
    metadata = machine.get("MetadataOptions", {})
    if (metadata.get("HttpTokens"), metadata.get("HttpPutResponseHopLimit")) != ("required", 1):
        yield "MetadataOptions: its role can be had by a request forged through another program"
    disks = [device["Ebs"] for device in machine.get("BlockDeviceMappings", [])]
    if not disks or not all(disk.get("Encrypted") and disk.get("VolumeSize", 0) >= 100 for disk in disks):
        yield "disk: not encrypted, or too small for the images"


def command_faults(config: dict[str, Any]) -> Iterator[str]:
    if told := [command for place in PLACES for command in config[place]]:
        yield f"installs what is not in the image: {told}"
    for place in STARTS:
        command = config[place][-1]
        token = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)/[^/;\s]+", command)
        if not re.search(r"\bexport\b[^;]* RAY_AUTH_MODE=token\b[^;]*;.* ray start ", command):
            yield f"{place}: whoever reaches it may submit"
        if not token or token[1] not in config["file_mounts"]:
            yield f"{place}: no token where it looks for it"
        elif f"--env=RAY_AUTH_TOKEN_PATH={token[0].partition('=')[2]}" not in config["docker"]["run_options"]:
            yield "docker: another token than that of the nodes"
        if "0.0.0.0" in command or ("--head" in command) != ("--dashboard-host=127.0.0.1" in command):
            yield f"{place}: a dashboard for others"
        if "ulimit -n 65536;" not in command or "--metrics-export-port=8080" not in command:
            yield f"{place}: files or metrics"
    if not {"--num-cpus=0", "--autoscaling-config=~/ray_bootstrap_config.yaml"} <= set(config[STARTS[0]][-1].split()):
        yield "head: takes work, or starts no nodes"


def strings(value: Any) -> Iterator[str]:
    """All keys and texts of a nest of dictionaries and lists."""
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


def test_the_cluster_is_as_it_should_be(config):
    """With all that Ray's defaults add: a nightly wheel and a dashboard for everybody, were they not overridden."""
    assert list(faults(config)) == []
    assert not any("0.0.0.0" in text or "http" in text for text in strings(config))


HEAD = ["available_node_types", "head"]
SIMULATE = ["available_node_types", "simulate"]
TRAIN = ["available_node_types", "train"]
ABSENT = object()


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        (["provider", "cache_stopped_nodes"], ABSENT, "its disk costs on"),
        (["provider", "aws_credentials"], {"aws_access_key_id": "AKIA"}, "a secret"),
        (["max_workers"], 2, "max_workers"),
        (["docker", "run_options", 0], "--env=AWS_REGION=us-east-1", "docker: region"),
        (["docker", "run_options", 0], "--env=AWS_SECRET_ACCESS_KEY=x", "a secret"),
        (["docker", "run_options", 1], "--env=RAY_AUTH_MODE=disabled", "docker: region or auth"),
        (["docker", "run_options", 2], "--env=RAY_AUTH_TOKEN=x", "a secret"),
        (["docker", "run_options", 2], "--env=RAY_AUTH_TOKEN_PATH=/else/where", "another token"),
        (["docker", "run_options", 3], "--privileged", "not confined"),
        (["docker", "image"], "registry.example.org/raylens:latest", "head: another image"),
        ([*TRAIN, "docker", "worker_image"], ABSENT, "train: another image"),
        ([*TRAIN, "docker", "worker_run_options"], [], "train: GPUs"),
        (["file_mounts"], {}, "no token"),
        (["setup_commands"], ["pip install -U ray"], "installs"),
        ([*STARTS[:1], 1], "ray start --head --dashboard-host=0.0.0.0", "a dashboard for others"),
        ([*STARTS[:1], 1], "ray start --head", "whoever reaches it"),
        ([*STARTS[:1], 1], "ray start --head", "head: takes work, or starts no nodes"),
        ([*STARTS[1:], 1], "ray start --address=$RAY_HEAD_IP:6379", "worker_start_ray_commands: whoever"),
        ([*STARTS[1:], 1], "ray start --address=$RAY_HEAD_IP:6379", "worker_start_ray_commands: files"),
        ([*HEAD, "resources"], {"CPU": 4}, "head: takes work"),
        ([*HEAD, "max_workers"], 1, "head: takes work"),
        ([*HEAD, "node_config", "InstanceMarketOptions"], {"MarketType": "spot"}, "head: spot"),
        ([*SIMULATE, "node_config", "InstanceMarketOptions"], ABSENT, "simulate: spot"),
        ([*TRAIN, "node_config", "InstanceMarketOptions"], {"MarketType": "spot"}, "train: spot"),
        ([*SIMULATE, "min_workers"], 1, "costs while nobody works"),
        ([*SIMULATE, "labels"], ABSENT, "simulate: label"),
        ([*TRAIN, "labels", "raylens.simulate"], "yes", "train: label"),
        ([*TRAIN, "resources"], {"CPU": 8}, "train: GPUs"),
        ([*HEAD, "node_config", "IamInstanceProfile"], ABSENT, "head: IamInstanceProfile: no role"),
        ([*TRAIN, "node_config", "IamInstanceProfile"], ABSENT, "train: IamInstanceProfile: no role"),
        ([*TRAIN, "node_config", "IamInstanceProfile"], {"Name": "raylens-head"}, "train: IamInstanceProfile: may"),
        ([*HEAD, "node_config", "SecurityGroupIds"], ABSENT, "head: SecurityGroupIds"),
        ([*TRAIN, "node_config", "ImageId"], ABSENT, "train: ImageId"),
        ([*HEAD, "node_config", "MetadataOptions"], ABSENT, "head: MetadataOptions"),
        ([*TRAIN, "node_config", "MetadataOptions", "HttpTokens"], "optional", "train: MetadataOptions"),
        ([*SIMULATE, "node_config", "BlockDeviceMappings"], ABSENT, "simulate: disk"),
        ([*HEAD, "node_config", "BlockDeviceMappings", 0, "Ebs", "Encrypted"], False, "head: disk"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_the_rules_see_what_breaks_them(config, place, value, fault):
    """A rule that lets all pass holds nothing."""
    broken = json.loads(json.dumps(config))
    *way, last = place
    at = broken
    for key in way:
        at = at[key]
    if value is ABSENT:
        del at[last]
    else:
        at[last] = value

    assert any(fault in found for found in faults(broken)), list(faults(broken))


def test_ray_refuses_a_key_that_it_does_not_know(config):
    """Otherwise its check would say nothing about a word that is misspelt."""
    misspelt = config | {"idle_timeout_minute": 5}

    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(misspelt)


def refused_by_aws(machine: dict[str, Any]) -> str:
    """What is wrong with a request for such a node; AWS's own description of its requests comes with botocore."""
    request = botocore.session.Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = botocore.validate.ParamValidator().validate(machine | {"MinCount": 1, "MaxCount": 1}, request)
    return report.generate_report()


def test_aws_knows_every_key_of_a_node(config):
    """Ray hands them on as they are, so that one that is misspelt is found out at the first launch."""
    machines = {name: node["node_config"] for name, node in config["available_node_types"].items()}

    assert {name: refused_by_aws(machine) for name, machine in machines.items()} == dict.fromkeys(machines, "")
    assert "HttpToken" in refused_by_aws(machines["head"] | {"MetadataOptions": {"HttpToken": "required"}})


def test_what_a_user_must_set_is_marked():
    """What is left as it stands there leads nowhere."""
    lines = [line for line in FILE.read_text().splitlines() if re.search(r"example\.org|0123456789|eu-central-1", line)]

    assert len(lines) == 6
    assert all("# yours" in line for line in lines)
    assert FILE.read_text().count("# yours") == len(lines)


def test_the_how_to_makes_what_the_file_asks_for(config):
    """Who copies its commands should be refused no node, and hand out no right that no node needs."""
    text = HOW_TO.read_text()
    written = re.findall(r"cat > (\w+\.json) <<'END'\n(.*?)^END$", text, re.DOTALL | re.MULTILINE)
    policies = {name: json.loads(body)["Statement"] for name, body in written}
    machines = {name: node["node_config"] for name, node in config["available_node_types"].items()}
    roles = {name: machine["IamInstanceProfile"]["Name"] for name, machine in machines.items()}

    assert set(re.findall(r"file://(\S+)", text)) == policies.keys() == {"trust.json", "bucket.json", "nodes.json"}
    assert f"for role in {roles['head']} {roles['simulate']}; do" in text
    assert roles["simulate"] == roles["train"]
    assert f"RAY_AUTH_TOKEN_PATH={config['file_mounts']['/home/ray/token']}/auth_token" in text
    actions, limits = set(), []
    for one in policies["nodes.json"]:
        actions |= {one["Action"]} if isinstance(one["Action"], str) else set(one["Action"])
        limits += one.get("Condition", {}).get("StringEquals", {}).items()
        if "iam:PassRole" in one["Action"]:
            assert one["Resource"].endswith(f":role/{roles['train']}")
    # All that the autoscaler asks of AWS, and what it takes to give a node its role.
    calls = ("DescribeInstances", "RunInstances", "CreateTags", "TerminateInstances")
    assert actions == {"iam:PassRole", *(f"ec2:{call}" for call in calls)}
    assert [value for key, value in limits if key.endswith("Tag/ray-cluster-name")] == [config["cluster_name"]] * 2
    assert [set(value) for key, value in limits if key == "ec2:InstanceType"] == [
        {machines[name]["InstanceType"] for name in ("simulate", "train")}
    ]


@dataclass
class Nodes:
    """A head and a node that simulates, on this machine."""

    head: int  # the process that holds it
    api: str
    token: str

    def ask(self, path: str) -> Any:
        request = urllib.request.Request(
            f"http://{self.api}{path}", headers={"Authorization": f"Bearer {self.token}"}
        )  # fmt: skip
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as given:
            return json.load(given)

    def nodes(self) -> list[dict[str, Any]]:
        return self.ask("/api/v0/nodes?detail=true")["data"]["result"]["result"]


def adapted(command: str, changes: dict[str, str]) -> str:
    """A command with other places and ports, none of which may have gone from it."""
    for old, new in changes.items():
        assert old in command, (old, command)
        command = command.replace(old, new)
    return command


@pytest.fixture(scope="module")
def nodes(config, tmp_path_factory) -> Iterator[Nodes]:
    """What the commands of the file start, with the environment that the launcher gives them."""
    folder = tmp_path_factory.mktemp("token")
    (folder / "auth_token").write_text(f"{secrets.token_hex()}\n")
    gcs, dashboard, *ports = map(str, local.free_ports(6))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}

    def command(place: str, kind: str, metrics: str, agent: str, **changes: str) -> str:
        node = config["available_node_types"][kind]
        (start,) = with_envs(
            [config[place][-1]],
            {"RAY_HEAD_IP": "127.0.0.1", "RAY_CLOUD_INSTANCE_ID": kind, "RAY_NODE_TYPE_NAME": kind},
        )
        told = {"RAY_OVERRIDE_RESOURCES": node["resources"], "RAY_OVERRIDE_LABELS": node.get("labels", {})}
        here = "exec ray start --block --node-ip-address=127.0.0.1 --object-store-memory=100000000"
        places = {
            "/opt/raylens/bin": str(Path(sys.executable).parent), "/home/ray/token": str(folder),
            "port=8080": f"port={metrics}", "ray start": f"{here} --dashboard-agent-listen-port={agent}",
        }  # fmt: skip
        return adapted(_with_environment_variables(start, told), places | changes)

    head = {
        "--port=6379": f"--port={gcs}",
        "--autoscaling-config=~/ray_bootstrap_config.yaml": f"--dashboard-port={dashboard}",
    }
    commands = [
        command(STARTS[0], "head", *ports[:2], **head),
        command(STARTS[1], "simulate", *ports[2:], **{"$RAY_HEAD_IP:6379": f"$RAY_HEAD_IP:{gcs}"}),
    ]
    with ExitStack() as running:
        # Its sockets want short names.
        temporary = running.enter_context(tempfile.TemporaryDirectory(prefix="raylens-"))
        around = outside | {
            "RAY_TMPDIR": temporary, "RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        }  # fmt: skip
        log = running.enter_context(open(folder / "log", "w"))
        started = []
        for one in commands:
            started.append(subprocess.Popen(["bash", "-c", one], env=around, stdout=log, stderr=log))
            running.callback(started[-1].wait, 60)
            running.callback(started[-1].terminate)
            wait(lambda: answer(f"127.0.0.1:{dashboard}", "/api/gcs_healthz"), 60)
        found = Nodes(started[0].pid, f"127.0.0.1:{dashboard}", (folder / "auth_token").read_text().strip())
        wait(lambda: len(found.nodes()) == 2, 60)
        yield found


def test_whoever_has_no_token_may_not_submit(nodes):
    """The token reaches Ray by the file that is mounted, and by nothing else."""
    assert answer(nodes.api, "/api/jobs/") == (401, b"")
    assert nodes.ask("/api/jobs/") == []


def test_the_dashboard_listens_on_loopback_alone(nodes):
    """`ray dashboard` leads there through SSH; the rest of the cluster has no need of it."""
    port = nodes.api.rpartition(":")[2]
    addresses = [address for address in listening(nodes.head) if address.rpartition(":")[2] == port]

    assert addresses
    assert all(map(is_loopback, addresses)), addresses


def test_nodes_are_what_the_file_says(nodes):
    """Else the autoscaler, which goes by the file, would wait for what its nodes never offer."""
    head, simulate = sorted(nodes.nodes(), key=lambda node: not node["is_head_node"])

    assert "CPU" not in head["resources_total"]
    assert simulate["resources_total"]["CPU"] == 16
    assert simulate["labels"]["raylens.simulate"] == "yes"
    assert "raylens.simulate" not in head["labels"]
