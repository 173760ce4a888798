"""The paper's two networks (section 2.2, figure 4), and a trained network as data: safetensors and JSON.

A network takes images (B, num_pixels, num_pixels) and, for the alpha-CNN, N (B,), in the units of
the dataset, and gives its target (B,) in the same units. Inside, the target and N are scaled by the
training labels, as `training.labels` says: mostly by their mean and standard deviation, which the paper
does not mention and without which its N-CNN is biased for many epochs (docs/paper.md).

Tensors: B images, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from raylens import storage
from raylens.baselines import Baseline
from raylens.config import Loss, Model, Settings, Training

NetworkName = Literal["n-cnn", "alpha-cnn"]

# What each network predicts: a column of a dataset.
TARGETS: dict[NetworkName, str] = {"n-cnn": "num_subhalos", "alpha-cnn": "alpha"}

# What stands beside its results: what the truth of other columns says of the target without an image.
BASELINES: dict[NetworkName, dict[str, tuple[str, ...]]] = {
    "n-cnn": {"n_constant": (), "n_from_ring": ("subhalo_theta_E", "theta_E")},
    "alpha-cnn": {
        "alpha_constant": (),
        "alpha_from_true_n": ("num_subhalos",),
        "alpha_from_true_n_and_mass": ("num_subhalos", "lens_mass"),
        "alpha_from_ring": ("subhalo_theta_E", "theta_E"),
    },
}

PIXEL_SCALE_TOLERANCE = 1e-3  # relative; over a frame of a thousand pixels it is one of them

_MOST_HEADER = 2**20  # bytes before the weights in a safetensors file; of ours it has some thousands

_ACTIVATIONS = {"relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "tanh": nn.Tanh}


class Scaling(Settings):
    """How a network sees a label: (value - offset) / scale."""

    offset: float
    scale: float = Field(gt=0)


class Card(Settings):
    """All that is known of a trained network; `model.json`."""

    network: NetworkName
    target: str
    loss: Loss  # of the scaled target
    num_pixels: int = Field(ge=1, le=4096)
    pixel_scale: float = Field(gt=0)  # of the images it was trained on [arcsec]
    normalised: bool  # whether those were scaled to minimum 0 and maximum 1
    num_parameters: int
    model: Model
    training: Training
    target_scaling: Scaling
    num_subhalos_scaling: Scaling
    baselines: dict[str, Baseline]  # by the name under which results.json has its measures
    recipe: str
    dataset: str  # URI
    dataset_digest: str
    validation_dataset: str | None  # None: a tenth of the dataset, held out
    num_training_images: int
    num_validation_images: int
    num_workers: int
    num_threads: int  # of each worker
    share: Literal["resident", "streamed"]  # of the images of each worker: kept in memory, or read in each epoch
    device: str
    epoch: int  # whose weights these are: the one with the lowest validation loss
    metrics: dict[str, float | int | None]  # of that epoch, as in metrics.jsonl
    seconds: float  # of training, start-up and what stood before a resumption included
    cpu_seconds: float  # of all epochs: cores held, times how long
    gpu_seconds: float
    versions: dict[str, str]


class CNN(nn.Module):
    """Convolution, activation, batch normalisation, pooling and dropout, repeated; then two dense layers.

    Raises
    ------
    ValueError
        If the layers pool the image away.
    """

    def __init__(
        self, network: NetworkName, model: Model, *, num_pixels: int, target: Scaling, num_subhalos: Scaling
    ) -> None:
        super().__init__()
        side = num_pixels >> len(model.filters)  # each pooling halves, rounding down
        if side < 1:
            raise ValueError(
                f"{len(model.filters)} layers pool images of {num_pixels} pixels away; model.filters may have "
                f"at most {num_pixels.bit_length() - 1} values."
            )
        self.target, self.num_subhalos, self.num_filters = target, num_subhalos, model.filters
        layers: list[nn.Module] = []
        num_channels = 1
        for num_filters in model.filters:
            layers += [
                nn.Conv2d(num_channels, num_filters, model.kernel_size, padding=model.kernel_size // 2),
                _ACTIVATIONS[model.activation](),
                nn.BatchNorm2d(num_filters),
                nn.MaxPool2d(2),
                nn.Dropout(model.dropout),
            ]
            num_channels = num_filters
        self.features = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Linear(num_channels * side * side, model.dense),
            _ACTIVATIONS[model.activation](),
        )
        self.takes_num_subhalos = network == "alpha-cnn"
        self.head = nn.Linear(model.dense + self.takes_num_subhalos, 1)

    def forward(self, image_BHW: Tensor, num_subhalos_B: Tensor) -> Tensor:
        """Return the scaled prediction (B,); the N-CNN does not look at num_subhalos_B."""
        features_BF = self.features(image_BHW.unsqueeze(1))
        if self.takes_num_subhalos:
            scaled_B = (num_subhalos_B - self.num_subhalos.offset) / self.num_subhalos.scale
            features_BF = torch.cat([features_BF, scaled_B.unsqueeze(1)], dim=1)
        return self.head(features_BF).squeeze(1)

    def scaled(self, target_B: Tensor) -> Tensor:
        """Return the target as `forward` predicts it."""
        return (target_B - self.target.offset) / self.target.scale

    def in_units(self, prediction_B: Tensor) -> Tensor:
        """Return what `forward` predicts in the units of the dataset."""
        return prediction_B * self.target.scale + self.target.offset


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def save(run: str, weights: bytes, card: Card) -> None:
    """Write a trained network into a run: the weights, and last the card, which makes it one."""
    storage.write(storage.join(run, "model.safetensors"), weights)
    storage.write(storage.join(run, "model.json"), json.dumps(card.as_dict(), indent=1) + "\n")


def read_card(run: str, network: NetworkName | None = None) -> Card:
    """Return what is known of the trained network in a run; of either, where none is asked for.

    Raises
    ------
    ValueError
        If the run holds none, or not the one asked for.
    """
    place = storage.join(run, "model.json")
    if not storage.exists(place):
        which = network or "n-cnn"
        raise ValueError(f"{run} holds no trained network; `raylens train {which} --to {run}` makes one.")
    try:
        card = Card.parse(storage.read_json(place))
    except ValueError as error:
        raise ValueError(f"{place} does not describe a network: {error}") from None
    if network not in (None, card.network):
        raise ValueError(f"{run} holds an {card.network}, where an {network} is needed.")
    return card


def require_fit(
    card: Card, *, shape: tuple[int, int], pixel_scale: float | None = None, normalised: bool | None = None
) -> None:
    """Refuse images that are not like those on which a network was trained.

    Parameters
    ----------
    shape
        Rows and columns of an image.
    pixel_scale
        In arcsec; None where the images do not state one, which is no reason to refuse them.
    normalised
        Whether the images have been scaled to minimum 0 and maximum 1; None where that is not known.
        It matters to a network that was trained on others: for it what is lost cannot be brought back.

    Raises
    ------
    ValueError
        With what the network was trained on, what these images are, and what to do.
    """
    n = card.num_pixels
    if shape != (n, n):
        raise ValueError(
            f"the {card.network} was trained on images of {n} x {n} pixels, and these have {shape[1]} x {shape[0]}; "
            "cut them to that size, or train on such images."
        )
    if pixel_scale is not None and not math.isclose(pixel_scale, card.pixel_scale, rel_tol=PIXEL_SCALE_TOLERANCE):
        raise ValueError(
            f"the {card.network} was trained on pixels of {card.pixel_scale:g} arcsec, and these have {pixel_scale:g} "
            f"(a difference of {PIXEL_SCALE_TOLERANCE:.1%} would do); resample them, or train on such images."
        )
    if not card.normalised and normalised is not False:
        what = "these have been" if normalised else "of these it is not known in which units they are"
        raise ValueError(
            f"the {card.network} was trained on images that were not normalised, and {what}; give it a dataset with "
            "camera.normalise=false, or a FITS or Parquet file of one, or train on normalised images."
        )


def require_same_images(n_cnn: Card, alpha_cnn: Card) -> None:
    """Refuse two networks that were not trained on images of one size, scale and normalisation."""
    there, here = (
        f"{card.num_pixels} x {card.num_pixels} pixels of {card.pixel_scale:g} arcsec, "
        f"{'' if card.normalised else 'not '}normalised"
        for card in (n_cnn, alpha_cnn)
    )
    same_scale = math.isclose(n_cnn.pixel_scale, alpha_cnn.pixel_scale, rel_tol=PIXEL_SCALE_TOLERANCE)
    same = (n_cnn.num_pixels, n_cnn.normalised) == (alpha_cnn.num_pixels, alpha_cnn.normalised)
    if not (same and same_scale):
        raise ValueError(
            f"the two networks were trained on different images: the n-cnn on {there}, the alpha-cnn on {here}; "
            "take two of one kind."
        )


def load(run: str, network: NetworkName) -> CNN:
    """Return the trained network of a run, ready to predict."""
    card = read_card(run, network)
    place = storage.join(run, "model.safetensors")
    try:
        _require_size(card, storage.size(place))
        model = build(card)
        model.load_state_dict(safetensors.torch.load(storage.read(place)))
    except (safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{place} does not hold the weights that model.json describes: {str(error).splitlines()[0]}"
        ) from None
    # In this layout a CPU predicts faster by half.
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # documented, not in the stubs


def _require_size(card: Card, num_bytes: int) -> None:
    """Refuse a file of weights of another size than the card's network has, before memory is taken for either."""
    with torch.device("meta"):  # which knows shapes, and holds no numbers
        tensors = build(card).state_dict().values()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if not needed <= num_bytes <= needed + _MOST_HEADER:
        raise RuntimeError(f"they take {needed:,} bytes, and it has {num_bytes:,}")


def build(card: Any) -> CNN:
    """Return the untrained network that a card describes."""
    return CNN(
        card.network,
        card.model,
        num_pixels=card.num_pixels,
        target=card.target_scaling,
        num_subhalos=card.num_subhalos_scaling,
    )
