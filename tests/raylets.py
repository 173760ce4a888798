"""Real nodes on this machine, each a raylet, the processes below one, where they listen, and waiting for them."""

import ipaddress
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.cluster_utils


@contextmanager
def cluster(head: dict[str, Any], *others: dict[str, Any]) -> Iterator[tuple[ray.cluster_utils.Cluster, list]]:
    """A cluster and its nodes, the head first; workers believe what each node says of itself."""
    believed = {name: os.environ.pop(name, None) for name in ("RAY_OVERRIDE_RESOURCES", "RAY_AUTH_MODE")}
    # A local Ray protects itself with a token, and whoever joins a cluster does not: both must be told.
    os.environ["RAY_AUTH_MODE"] = "disabled"
    nodes = ray.cluster_utils.Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **head})
    try:
        yield nodes, [nodes.head_node, *(nodes.add_node(**other) for other in others)]
    finally:
        nodes.shutdown()
        for name, value in believed.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def wait(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until something holds: what a node starts is there a while after the node."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


def raylet(node: Any) -> int:
    """The process of a node that starts its workers."""
    (process,) = node.all_processes["raylet"]
    return process.process.pid


def descendants(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue  # it has just ended
        parent = int(text[text.rindex(")") + 2 :].split()[1])
        children.setdefault(parent, []).append(int(stat.parent.name))
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            yield child
            waiting.append(child)


def title(pid: int) -> str:
    """What a process calls itself, as a Ray worker does after its task; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def listening(pid: int) -> dict[str, set[str]]:
    """The addresses on which a process and its descendants wait for connections, each with their titles."""
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A":  # LISTEN
                sockets[f"socket:[{inode}]"] = _address(*local.split(":"))
    found: dict[str, set[str]] = {}
    for one in (pid, *descendants(pid)):
        try:
            held = [os.readlink(fd) for fd in Path(f"/proc/{one}/fd").iterdir()]
        except OSError:
            continue  # it has just ended
        for name in held:
            if name in sockets:
                found.setdefault(sockets[name], set()).add(title(one))
    return found


def _address(words: str, port: str) -> str:
    """The kernel writes an address as words of four bytes, each in the machine's own order."""
    packed = b"".join(bytes.fromhex(words[i : i + 8])[::-1] for i in range(0, len(words), 8))
    address = ipaddress.ip_address(packed)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return f"{address}:{int(port, 16)}"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an address with its port."""
    return ipaddress.ip_address(address.rsplit(":", 1)[0]).is_loopback
