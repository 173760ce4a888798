"""A training stopped at any step, as files: weights and optimiser as tensors, the rest as JSON."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import nn


@dataclass
class Position:
    """How far a training has come."""

    history: list[dict[str, Any]] = field(default_factory=list)  # a record for each epoch that has ended
    world_size: int = 0  # of the ranks that came here
    step: int = 0  # of the epoch in progress
    loss_sum: float = 0.0  # over the images of its steps
    seconds: float = 0.0  # spent on them

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the next, counted from 1."""
        return len(self.history) + 1


def save(folder: str, network: nn.Module, steps: torch.optim.Optimizer, position: Position) -> None:
    """Write what all ranks share."""
    safetensors.torch.save_file(_weights(network), os.path.join(folder, "model.safetensors"))
    safetensors.torch.save_file(_moments(steps), os.path.join(folder, "optimizer.safetensors"))
    with open(os.path.join(folder, "position.json"), "w") as file:
        json.dump(asdict(position), file)


def save_random_state(folder: str, rank: int) -> None:
    """Write the state of a rank's random numbers, which draw the dropout."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    safetensors.torch.save_file(states, _random_state(folder, rank))


def restore(folder: str, network: nn.Module, steps: torch.optim.Optimizer, *, rank: int, world_size: int) -> Position:
    """Load a checkpoint, and this rank's random state; return how far it is.

    Where there are more or fewer ranks now, their shares are others, so the epoch in progress is
    begun again, with the weights as they are.
    """
    network.load_state_dict(safetensors.torch.load_file(os.path.join(folder, "model.safetensors")))
    _load_moments(steps, safetensors.torch.load_file(os.path.join(folder, "optimizer.safetensors")))
    with open(os.path.join(folder, "position.json")) as file:
        position = Position(**json.load(file))
    if position.step and position.world_size == world_size:
        states = safetensors.torch.load_file(_random_state(folder, rank))
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
        return position
    return Position(position.history, world_size)


def packed(network: nn.Module, steps: torch.optim.Optimizer, position: Position, settings: dict[str, Any]) -> bytes:
    """Return what one process needs to go on from the end of an epoch, as one safetensors file."""
    tensors = {
        **{f"model.{name}": value for name, value in _weights(network).items()},
        **{f"optimizer.{name}": value for name, value in _moments(steps).items()},
    }
    return safetensors.torch.save(tensors, {"position": json.dumps(asdict(position)), "settings": json.dumps(settings)})


def settings_of(content: bytes) -> dict[str, Any]:
    """Return the settings of what `packed` returned."""
    return json.loads(_metadata(content)["settings"])


def unpack(content: bytes, network: nn.Module, steps: torch.optim.Optimizer) -> Position:
    """Load what `packed` returned; return how far it is."""
    tensors = safetensors.torch.load(content)
    groups: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    for key, value in tensors.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    network.load_state_dict(groups["model"])
    _load_moments(steps, groups["optimizer"])
    return Position(**json.loads(_metadata(content)["position"]))


def _metadata(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")  # of the header, where safetensors keeps what is no tensor
    return json.loads(content[8 : 8 + length])["__metadata__"]


def _weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in network.state_dict().items()}


def _moments(steps: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{parameter}.{name}": value.contiguous()
        for parameter, state in steps.state_dict()["state"].items()
        for name, value in state.items()
    }


def _load_moments(steps: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = [parameter for group in steps.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".")
        parameter = parameters[int(number)]
        # A fused optimiser takes a moment's memory to be laid out as its parameter's is.
        laid_out = torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value
        moments.setdefault(int(number), {})[name] = laid_out
    steps.load_state_dict({"state": moments, "param_groups": steps.state_dict()["param_groups"]})


def _random_state(folder: str, rank: int) -> str:
    return os.path.join(folder, f"random-{rank}.safetensors")
