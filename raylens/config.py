"""What to do, as frozen and validated values: an Experiment is a Simulation and two Networks.

Every field is followed by its meaning and unit, and every default is the paper's
fixed-geometry experiment (section 3.1.1 of the paper; docs/paper.md says what the paper
leaves open). What cannot work is refused when it is built. A Simulation decides every
pixel of a dataset, and its digest names the dataset; a Network decides nothing about data.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from scipy.special import ndtr, ndtri

# Raised whenever the code makes other rows from the same Simulation: other draws, other pixels, other columns.
SIMULATOR_VERSION = 2

NAME = r"^[a-z0-9][a-z0-9.-]*$"  # of what becomes the name of a folder

# Settings that came after this version, without a change to the rows of those who do not use them.
_LATER = [("subhalos", "mass_total", None)]

# The splits of a dataset, and the slope at which each is held (None: as the Simulation says).
SPLITS: dict[str, float | None] = {
    "train": None,
    "validation": None,
    "test": None,
    "test-alpha-1.6": -1.6,
    "test-alpha-1.8": -1.8,
    "test-alpha-2.0": -2.0,
    "test-alpha-2.2": -2.2,
    "test-alpha-2.4": -2.4,
}


class Settings(BaseModel):
    """A frozen set of named values that knows no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Return the settings that a nested dictionary describes; ValueError with one line if it cannot."""
        try:
            # By way of JSON, where a tuple is a list and 1 is also 1.0, but "1" is neither; TOML's dates are words.
            return cls.model_validate_json(json.dumps(values, default=str))
        except ValidationError as error:
            raise ValueError(explain(error, cls)) from None

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as nested dictionaries, lists and numbers, ready for JSON."""
        return self.model_dump(mode="json")

    def override(self, changes: dict[str, Any]) -> Self:
        """Return the settings with the values at dotted keys replaced."""
        values = self.as_dict()
        for key, value in changes.items():
            check_key(type(self), key)
            *parents, name = key.split(".")
            place = values
            for parent in parents:
                place = place[parent]
            place[name] = value
        return type(self).parse(values)


class Uniform(Settings):
    """A value drawn evenly between two ends."""

    uniform: tuple[float, float]  # lowest, highest

    @model_validator(mode="after")
    def _ends_in_order(self) -> Self:
        low, high = self.uniform
        if not low < high:
            raise ValueError(
                f"uniform needs [low, high] with low < high; got [{low}, {high}]. A plain number fixes a value."
            )
        return self


class Normal(Settings):
    """A value drawn from a normal distribution that is cut at two ends."""

    normal: tuple[float, float, float, float]  # mean, standard deviation, lowest, highest

    @model_validator(mode="after")
    def _ends_in_order(self) -> Self:
        mean, sd, low, high = self.normal
        if not (sd > 0 and low < high):
            raise ValueError(
                f"normal needs [mean, sd, low, high] with sd > 0 and low < high; got [{mean}, {sd}, {low}, {high}]. "
                "A plain number fixes a value."
            )
        if ndtr((high - mean) / sd) - ndtr((low - mean) / sd) < 1e-6:
            raise ValueError(
                f"normal with mean {mean} and sd {sd} hardly ever falls in [{low}, {high}]; move the ends."
            )
        return self


def _kind_of_distribution(value: Any) -> str | None:
    if isinstance(value, dict):
        return next(iter(value)) if len(value) == 1 else None
    if isinstance(value, (Uniform, Normal)):
        return type(value).__name__.lower()
    return "number"


# A quantity that varies from image to image, or a plain number, which fixes it.
Distribution = Annotated[
    Annotated[float, Tag("number")] | Annotated[Uniform, Tag("uniform")] | Annotated[Normal, Tag("normal")],
    Discriminator(_kind_of_distribution),
]


def support(distribution: float | Uniform | Normal) -> tuple[float, float]:
    """Return the lowest and the highest value that a distribution can give."""
    if isinstance(distribution, Uniform):
        return distribution.uniform
    if isinstance(distribution, Normal):
        return distribution.normal[2:]
    return distribution, distribution


def quantile(distribution: float | Uniform | Normal, u: np.ndarray) -> np.ndarray:
    """Return the values below which a share u of the distribution lies, shaped like u in [0, 1)."""
    if isinstance(distribution, Uniform):
        low, high = distribution.uniform
        return low + (high - low) * u
    if isinstance(distribution, Normal):
        mean, sd, low, high = distribution.normal
        below, above = ndtr((low - mean) / sd), ndtr((high - mean) / sd)
        return np.clip(mean + sd * ndtri(below + (above - below) * u), low, high)
    return np.full_like(u, distribution)


class Lens(Settings):
    """The main lens: a singular isothermal ellipsoid."""

    theta_E: Distribution = 1.5  # Einstein radius, intermediate-axis convention [arcsec]
    q: Distribution = 0.78  # minor over major axis of the mass, in (0, 1]
    phi: Distribution = 0.0  # from the x-axis to the major axis, counter-clockwise [rad]
    x: Distribution = 0.0  # centre [arcsec]
    y: Distribution = 0.0  # centre [arcsec]
    z_lens: Distribution = 0.5  # redshift; the paper fixes it and does not say at what

    @model_validator(mode="after")
    def _is_a_lens(self) -> Self:
        if support(self.theta_E)[0] <= 0:
            raise ValueError(f"lens.theta_E must be positive; it reaches down to {support(self.theta_E)[0]}.")
        low, high = support(self.q)
        if low <= 0 or high > 1:
            wrong = high if high > 1 else low
            raise ValueError(
                f"lens.q is minor/major, so it must lie in (0, 1]; got {wrong}. For a major/minor ratio pass 1/q."
            )
        if support(self.z_lens)[0] <= 0:
            raise ValueError(f"lens.z_lens must be positive; it reaches down to {support(self.z_lens)[0]}.")
        return self


class Source(Settings):
    """The lensed galaxy: a round Gaussian at the origin of the source plane."""

    z: Distribution = 1.77  # redshift
    sigma: Distribution = 0.9  # standard deviation of the light [arcsec]
    cut: Annotated[float, Field(gt=0)] | None = None  # radius beyond which it has no light [arcsec]; null: none

    @model_validator(mode="after")
    def _is_a_source(self) -> Self:
        if support(self.sigma)[0] <= 0:
            raise ValueError(f"source.sigma must be positive; it reaches down to {support(self.sigma)[0]}.")
        return self


MassFunction = Literal["power-law", "decades"]


class Subhalos(Settings):
    """The subhaloes: singular isothermal spheres with dN/dM proportional to M^alpha (eq. 2.1)."""

    alpha: Distribution = Uniform(uniform=(-2.5, -1.5))  # slope of the mass function
    # decades: no masses but mass_min and its tenfolds up to mass_max, the k-th (from 1) in proportion to k^alpha.
    mass_function: MassFunction = "power-law"
    # The limits reproduce the paper's two stated means of N: physics.subhalos.solve_mass_limits.
    mass_min: float = Field(7.40e8, gt=0)  # [Msun]
    mass_max: float = Field(1.70e11, gt=0)  # [Msun]
    mass_fraction: float = Field(0.1, gt=0, le=1)  # drawn until their mass reaches this share of the lens mass
    mass_total: Annotated[float, Field(gt=0)] | None = None  # or until it reaches this, whatever the lens [Msun]
    h: float = Field(1.0, gt=0)  # factor of their mass in eq. 2.3, which the paper drops
    z_lens: Annotated[float, Field(gt=0)] | None = None  # of their Einstein radii in eq. 2.2; null: the lens's
    compensation: Literal["none", "sheet"] = "none"  # sheet: negative uniform convergence that takes their mass away

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        if not self.mass_min < self.mass_max:
            raise ValueError(
                f"subhalos.mass_min must be below subhalos.mass_max; got {self.mass_min:g} and {self.mass_max:g} Msun."
            )
        return self


class Camera(Settings):
    """What becomes of the light on its way into pixels."""

    num_pixels: int = Field(60, ge=4, le=4096)  # on each side
    pixel_scale: float = Field(0.1, gt=0)  # [arcsec]
    psf_sigma: float = Field(0.07, ge=0)  # of the Gaussian point-spread function [arcsec]; 0: none
    signal_to_noise: Annotated[float, Field(gt=0)] | None = 300.0  # null: no noise
    noise_reference: Literal["frame", "peak"] = (
        "frame"  # the signal in signal_to_noise: summed over the frame, or the peak pixel
    )
    normalise: bool = True  # scale each image to minimum 0 and maximum 1
    bits: Annotated[int, Field(ge=1, le=16)] | None = None  # pixels rounded to 2^bits values from 0 to 1; null: not
    supersampling: int = Field(1, ge=1, le=16)  # rays per pixel and axis

    @model_validator(mode="after")
    def _bits_have_a_range(self) -> Self:
        if self.bits is not None and not self.normalise:
            raise ValueError("camera.bits rounds pixels between 0 and 1, so it needs camera.normalise=true.")
        return self

    @model_validator(mode="after")
    def _psf_fits_the_frame(self) -> Self:
        if self.psf_sigma >= self.num_pixels * self.pixel_scale:
            raise ValueError(
                f"camera.psf_sigma must be smaller than the frame of {self.num_pixels * self.pixel_scale:g} arcsec; "
                f"got {self.psf_sigma:g} arcsec. It is in arcsec, not in pixels."
            )
        return self


class Output(Settings):
    """What is stored of each image beside its truth."""

    catalogue: bool = False  # the subhaloes one by one: position, mass, Einstein radius


class Simulation(Settings):
    """Everything that decides the rows of a dataset."""

    engine: Literal["numba", "lenstronomy"] = "numba"  # what traces the rays; lenstronomy is the reference
    seed: int = Field(0, ge=0, lt=2**63)
    cosmology: Literal["Planck18", "WMAP9"] = "Planck18"  # of the distances, by astropy
    lens: Lens = Lens()
    source: Source = Source()
    subhalos: Subhalos = Subhalos()
    camera: Camera = Camera()
    output: Output = Output()

    @model_validator(mode="after")
    def _can_be_simulated(self) -> Self:
        z_source = support(self.source.z)[0]
        for name, z_lens in (("lens", support(self.lens.z_lens)[1]), ("subhalos", self.subhalos.z_lens)):
            if z_lens is not None and z_lens >= z_source:
                raise ValueError(
                    f"the source must lie behind the lens; source.z reaches down to {z_source:g} "
                    f"and {name}.z_lens up to {z_lens:g}."
                )
        return self

    @property
    def digest(self) -> str:
        """Eight characters that name all that is made from this Simulation by this version of the simulator."""
        return digest({"simulator_version": SIMULATOR_VERSION, "simulation": self.identity()})

    def identity(self) -> dict[str, Any]:
        """Return the settings by which its datasets are known: a later one is left out while it changes nothing."""
        values = self.as_dict()
        for group, name, default in _LATER:
            if values[group][name] == default:
                del values[group][name]
        return values


class Model(Settings):
    """The shape of a network (section 2.2; the number of layers is the number of filters)."""

    filters: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)  # of each convolution, from the input on
    kernel_size: int = Field(ge=1)  # of every convolution [pixels], odd
    dense: int = Field(512, ge=1)  # width of the first dense layer
    dropout: float = Field(0.25, ge=0, lt=1)  # share of outputs put out after each pooling
    activation: Literal["relu", "elu", "gelu", "tanh"] = "relu"

    @model_validator(mode="after")
    def _kernel_has_a_centre(self) -> Self:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"model.kernel_size must be odd, so that 'same' padding is even; got {self.kernel_size}.")
        return self


Precision = Literal["float32", "bfloat16"]
Loss = Literal["mse", "mae"]  # mean squared error (eq. 2.4), mean absolute error
Labels = Literal["standardised", "unit", "raw"]


class Training(Settings):
    """How a network is trained (section 2.2)."""

    num_epochs: int = Field(100, ge=1)
    batch_size: int = Field(16, ge=2)  # images a step, over all workers
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"  # of the learning rate; cosine: to 0 after num_epochs
    optimizer: Literal["adam", "nadam"] = "adam"
    loss: Loss = "mse"  # of the scaled target; the epoch with the lowest on validation images is kept
    # How the target, and the N that the alpha-CNN is given, are scaled by the training labels: to mean 0 and
    # deviation 1, to lie from 0 to 1, or not at all.
    labels: Labels = "standardised"
    precision: Precision = "float32"  # of a network's arithmetic while it is trained; it predicts in float32
    patience: Annotated[int, Field(ge=1)] | None = None  # stop after so many epochs without a better one; null: never
    seed: int = Field(0, ge=0, lt=2**63)


class Network(Settings):
    """A network and how it is trained."""

    model: Model
    training: Training = Training()


# Hyper-parameters that are no fields: what Model.filters follows from.
LAYERS = ("num_layers", "filters", "growth")
# What decides how long a training is or what its error means; trials that differ in these do not compare.
_NOT_SEARCHED = ("num_epochs", "patience", "seed", "loss", "labels")
# And those that are fields, with the group of settings each belongs to.
SEARCHED_FIELDS = {
    **{name: f"model.{name}" for name in Model.model_fields if name != "filters"},
    **{name: f"training.{name}" for name in Training.model_fields if name not in _NOT_SEARCHED},
}


class Search(Settings):
    """What a campaign searches (section 2.2): the values that each hyper-parameter may take.

    A hyper-parameter is a field of Model or Training. Three stand for the filters of all layers:
    layer k of `num_layers` has `filters` * `growth`^k of them, from k = 0 at the input on.
    """

    name: str = Field(pattern=NAME)
    network: Literal["n-cnn", "alpha-cnn"]
    recipe: str = "paper-fixed"  # whose settings hold for what is not searched
    metric: Literal["validation_rmse", "validation_loss"] = "validation_rmse"  # the lowest of a trial's epochs ranks it
    epochs: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]  # none is stopped before, none goes beyond
    trials_per_gpu: int = Field(4, ge=1)  # on CPUs each trial has one
    seed: int = Field(0, ge=0, lt=2**63)  # of the sequence of trials
    values: dict[str, Annotated[tuple[int | float | str, ...], Field(min_length=1)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _can_be_searched(self) -> Self:
        least, most = self.epochs
        if least > most:
            raise ValueError(f"epochs needs [least, most] with least <= most; got [{least}, {most}].")
        known = [*SEARCHED_FIELDS, *LAYERS]
        for name in self.values:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}."
                raise ValueError(f"there is no hyper-parameter {name}; {hint}")
        missing = [name for name in LAYERS if name not in self.values]
        if 0 < len(missing) < len(LAYERS):
            raise ValueError(
                f"{', '.join(LAYERS)} say together what the layers are, so all of them need values; "
                f"{missing[0]} has none. A single value fixes it."
            )
        for name in set(LAYERS) & self.values.keys():
            wrong = [value for value in self.values[name] if not isinstance(value, int) or value < 1]
            if wrong:
                raise ValueError(f"{name} is a whole number of 1 or more; got {wrong[0]!r}.")
        for name, values in self.values.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}.")
        return self


class NumImages(Settings):
    """How many images each split holds; training to test is 5 : 1 (section 2.2)."""

    train: int = Field(100_000, ge=1)
    validation: int = Field(10_000, ge=1)  # the paper does not say
    test: int = Field(20_000, ge=1)
    test_alpha: int = Field(5_000, ge=1)  # in each of the sets with alpha held

    @staticmethod
    def field_of(split: str) -> str:
        """Return the name of the field that holds for a split of SPLITS."""
        return "test_alpha" if split.startswith("test-alpha") else split

    def of(self, split: str) -> int:
        """Return the number of images in a split of SPLITS."""
        return int(getattr(self, self.field_of(split)))


class Experiment(Settings):
    """All that `raylens reproduce` needs: what to simulate, how much, and what to train on it."""

    name: str = Field("paper-fixed", pattern=NAME)  # also the start of its datasets' names
    simulation: Simulation = Simulation()
    num_images: NumImages = NumImages()
    n_cnn: Network = Network(model=Model(filters=(16, 32, 64), kernel_size=5))
    alpha_cnn: Network = Network(model=Model(filters=(8,), kernel_size=3))

    def override(self, changes: dict[str, Any]) -> Experiment:
        """Return the experiment with the values at dotted keys replaced.

        A key that starts with `model` or `training` means both networks, one that starts like a
        field of Simulation means that field, and any other is spelled from the top: `n_cnn.training.seed`.
        """
        full: dict[str, Any] = {}
        for key, value in changes.items():
            first = key.split(".")[0]
            if first in Network.model_fields:
                full |= {f"n_cnn.{key}": value, f"alpha_cnn.{key}": value}
            elif first in Simulation.model_fields:
                check_key(Simulation, key)
                full[f"simulation.{key}"] = value
            else:
                full[key] = value
        return super().override(full)


def digest(values: dict[str, Any]) -> str:
    """Return eight hexadecimal characters of the SHA-256 of a dictionary's canonical JSON."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]


def keys(settings: type[BaseModel]) -> list[str]:
    """Return the dotted names of all single values in a kind of settings."""
    names = []
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            names += [f"{name}.{below}" for below in keys(field.annotation)]
        else:
            names.append(name)
    return names


def check_key(settings: type[BaseModel], key: str) -> None:
    """Refuse a dotted key that names no value, with the nearest that does."""
    known = keys(settings)
    if key in known:
        return
    below = [name for name in known if name.startswith(f"{key}.")]
    if below:
        raise ValueError(f"{key} is a group of values, not a value; set one of {', '.join(below)}.")
    raise ValueError(f"there is no {key}{_nearest(key, known)}")


def _nearest(key: str, known: list[str]) -> str:
    # A forgotten group (num_pixels for camera.num_pixels) is as likely as a slip of the pen.
    known = [name.removeprefix("simulation.") for name in known]
    names = [name for name in known if name.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {names[0]}?" if names else f"; known are {', '.join(known)}."


def explain(error: ValidationError, settings: type[BaseModel]) -> str:
    """Return pydantic's first complaint as one line that says where, what must hold and what arrived."""
    first = error.errors()[0]
    # The tag of a distribution's kind is no part of its name, and a simulation's settings go without prefix.
    where = ".".join(str(part) for part in first["loc"] if part not in ("number", "uniform", "normal"))
    where = where.removeprefix("simulation.")
    if first["type"] in ("union_tag_invalid", "union_tag_not_found") or (
        {"uniform", "normal"} & set(first["loc"]) and first["type"] != "value_error"
    ):
        where = re.sub(r"\.\d+$", "", where)
        return f'{where} takes a number, {{"uniform": [low, high]}} or {{"normal": [mean, sd, low, high]}}.'
    if first["type"] == "extra_forbidden":
        return f"there is no {where}{_nearest(where, keys(settings))}"
    if first["type"] == "value_error":
        named = {"uniform", "normal"} & set(first["loc"])  # a distribution does not know whose it is
        return f"{where}: {first['ctx']['error']}" if named else str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{where} is missing."
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}; got {json.dumps(first['input'])}."
