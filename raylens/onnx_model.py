"""A trained network as one ONNX file, for whatever runs such: images in, N or alpha out, in the units of the dataset.

Inputs: `image` (batch, num_pixels, num_pixels) float32, normalised as in training, and for the
alpha-CNN `num_subhalos` (batch,) float32; output: (batch,), named like the target. The metadata
hold the model's card, as `model.json` has it.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raylens import __version__, models, storage


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what that cost."""

    onnx: str  # URI
    network: str
    bytes: int
    seconds: float


def export(run: str, to: str) -> Exported:
    """Write the trained network of a run into one ONNX file.

    Raises
    ------
    ValueError
        If the run holds none, `to` does not end in .onnx, or the packages that write ONNX are not there.
    """
    started = time.perf_counter()
    run, to = storage.absolute(run), storage.absolute(to)
    if not to.endswith(".onnx"):
        raise ValueError(f"a network is written to a file that ends in .onnx; got {to}.")
    card = models.read_card(run)
    network = models.load(run, card.network)
    storage.check_writable(to.rpartition("/")[0])
    content = encode(network, card)
    storage.write(to, content)
    return Exported(onnx=to, network=card.network, bytes=len(content), seconds=time.perf_counter() - started)


def encode(network: models.CNN, card: models.Card) -> bytes:
    """Return the bytes of an ONNX file."""
    try:
        import onnx
        import onnxscript  # noqa: F401  # torch needs it
    except ImportError as error:
        raise ValueError(f"ONNX needs a package that is not here, {error.name}: pip install 'raylens[onnx]'.") from None
    examples = [torch.rand(2, card.num_pixels, card.num_pixels)]
    names = ["image"]
    if network.takes_num_subhalos:
        examples.append(torch.rand(2))
        names.append("num_subhalos")
    batch: list[dict[int, object]] = [{0: torch.export.Dim("batch")}, {0: torch.export.Dim.AUTO}]
    torch_log = logging.getLogger("torch.onnx")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)  # it misses torchvision
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch to itself
            program = torch.onnx.export(
                _InUnits(network).eval(),
                tuple(examples),
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=[card.target],
                dynamic_shapes=tuple(batch[: len(examples)]),
            )
    finally:
        torch_log.setLevel(level)
    assert program is not None
    model = program.model_proto
    graph = model.graph
    # Torch notes from which lines of which files each node comes; they are of no use elsewhere.
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    graph.input[0].doc_string = _meaning_of_image(card)
    model.producer_name, model.producer_version = "raylens", __version__
    onnx.helper.set_model_props(model, {"raylens": json.dumps(card.as_dict())})
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


class _InUnits(nn.Module):
    """A network whose prediction is in the units of the dataset; without N for the one that does not look at it."""

    def __init__(self, network: models.CNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, image_BHW: Tensor, num_subhalos_B: Tensor | None = None) -> Tensor:
        if num_subhalos_B is None:
            num_subhalos_B = image_BHW[:, 0, 0]
        return self.network.in_units(self.network(image_BHW, num_subhalos_B))


def _meaning_of_image(card: models.Card) -> str:
    units = "scaled to minimum 0 and maximum 1" if card.normalised else "not normalised"
    return f"image[row, column], y grows with row and x with column; pixels of {card.pixel_scale:g} arcsec, {units}"
