"""A block of row numbers to lens images and their truth; chance and pixels live here, and no Ray.

A row is a function of (simulation, split, index): each has two random streams of its own, one for
the sky and one for the noise, so that neither its neighbours nor the noise can change what is
drawn. Drawing and rendering are two functions: a faster renderer replaces only `render_block`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from raylens.config import SPLITS, Normal, Simulation, Subhalos, Uniform, quantile, support
from raylens.image import normalise
from raylens.physics import lenses, render
from raylens.physics.cosmology import distance_ratio
from raylens.physics.subhalos import mass_quantile, mean_num_subhalos

_SKY, _NOISE = 0, 1  # the two streams of a row
_NUM_DRAWN_AT_ONCE = 512  # subhaloes, then twice as many; changes the speed, not the draws

# Above this many subhaloes in one image a mass function is a mistake, not an experiment.
MAX_NUM_SUBHALOS = 100_000


@dataclass(frozen=True)
class Draws:
    """The skies of a block of rows: arrays with one value a row, but for the subhaloes.

    alpha, theta_E [arcsec], q, phi [rad], x, y [arcsec], z_lens, z_source, sigma_v [km/s],
    lens_mass [Msun] and source_sigma [arcsec] are float64. Row i has the subhaloes
    [first_subhalo[i], first_subhalo[i + 1]) of subhalos_x, subhalos_y [arcsec, absolute],
    subhalos_mass [Msun] and subhalos_theta_E [arcsec], in the order in which they were drawn.
    """

    simulation: Simulation
    split: str
    index: np.ndarray  # int64
    alpha: np.ndarray
    theta_E: np.ndarray
    q: np.ndarray
    phi: np.ndarray
    x: np.ndarray
    y: np.ndarray
    z_lens: np.ndarray
    z_source: np.ndarray
    sigma_v: np.ndarray
    lens_mass: np.ndarray
    source_sigma: np.ndarray
    subhalos_x: np.ndarray
    subhalos_y: np.ndarray
    subhalos_mass: np.ndarray
    subhalos_theta_E: np.ndarray
    first_subhalo: np.ndarray  # int64

    @property
    def num_subhalos(self) -> np.ndarray:
        """N of each row, int64."""
        return np.diff(self.first_subhalo)

    def sum_over_subhalos(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of a value of the subhaloes over each row."""
        # A row without subhaloes cannot be: they are drawn until their mass is reached.
        return np.add.reduceat(values, self.first_subhalo[:-1])


def simulate_block(
    simulation: Simulation, indices: np.ndarray | range | list[int], split: str = "train"
) -> dict[str, np.ndarray]:
    """Return rows of a dataset as columns: index, image and truth, under the names and units of `dataset`.

    With `output.catalogue` also the columns subhalos_*, of all rows one after the other, and
    first_subhalo, where each row starts in them.
    """
    draws = draw_block(simulation, indices, split)
    columns = {
        "index": draws.index,
        "image": render_block(draws),
        "num_subhalos": draws.num_subhalos.astype(np.int32),
        "alpha": draws.alpha.astype(np.float32),
        **{
            name: getattr(draws, name)
            for name in ("theta_E", "q", "phi", "x", "y", "z_lens", "z_source", "sigma_v", "lens_mass")
        },
        "subhalo_mass": draws.sum_over_subhalos(draws.subhalos_mass),
        "subhalo_theta_E": draws.sum_over_subhalos(draws.subhalos_theta_E),
        "source_sigma": draws.source_sigma,
    }
    if simulation.output.catalogue:
        names = ("subhalos_x", "subhalos_y", "subhalos_mass", "subhalos_theta_E", "first_subhalo")
        columns |= {name: getattr(draws, name) for name in names}
    return columns


def require_drawable(simulation: Simulation, split: str = "train") -> None:
    """Refuse a mass function that would fill a typical lens of a split with more than MAX_NUM_SUBHALOS."""
    num_subhalos = typical_num_subhalos(simulation, split)
    if not num_subhalos <= MAX_NUM_SUBHALOS:
        raise ValueError(
            f"a typical lens of split {split} would hold about {num_subhalos:.2g} subhaloes "
            f"at slope {support(_slopes(simulation, split))[0]:g}, and at most {MAX_NUM_SUBHALOS:,} are sensible; "
            f"raise subhalos.mass_min (now {simulation.subhalos.mass_min:g} Msun) or lower subhalos.mass_fraction."
        )


def typical_num_subhalos(simulation: Simulation, split: str) -> float:
    """Return the mean N of a lens of middling redshifts and size at the steepest slope of a split."""
    lens, source, population = simulation.lens, simulation.source, simulation.subhalos
    middle = np.array([0.5])
    ratio = distance_ratio(quantile(lens.z_lens, middle), quantile(source.z, middle), cosmology=simulation.cosmology)
    lens_mass = float(lenses.mass(lenses.velocity_dispersion(quantile(lens.theta_E, middle), ratio))[0])
    return mean_num_subhalos(
        alpha=support(_slopes(simulation, split))[0],
        mass_min=population.mass_min,
        mass_max=population.mass_max,
        mass_function=population.mass_function,
        mass_to_reach=_mass_to_reach(population, lens_mass),
    )


def draw_block(simulation: Simulation, indices: np.ndarray | range | list[int], split: str = "train") -> Draws:
    """Return what chance decides about some rows of a split, their noise apart (section 2.1).

    Raises
    ------
    ValueError
        If the split is none of SPLITS.
    """
    index = np.asarray(indices, dtype=np.int64)
    lens, source, population = simulation.lens, simulation.source, simulation.subhalos
    key = _key(simulation.seed, split)
    skies = [_generator(key, _SKY, i) for i in index]

    # Each quantity has its place among a row's first numbers: to fix one leaves the others as they are.
    u = np.array([sky.random(9) for sky in skies]).reshape(-1, 9).T
    alpha = quantile(_slopes(simulation, split), u[0])
    theta_E, q, phi = quantile(lens.theta_E, u[1]), quantile(lens.q, u[2]), quantile(lens.phi, u[3])
    x, y, z_lens = quantile(lens.x, u[4]), quantile(lens.y, u[5]), quantile(lens.z_lens, u[6])
    z_source, source_sigma = quantile(source.z, u[7]), quantile(source.sigma, u[8])

    ratio = distance_ratio(z_lens, z_source, cosmology=simulation.cosmology)
    ratio_of_subhalos = ratio
    if population.z_lens is not None:
        there = np.full_like(z_source, population.z_lens)
        ratio_of_subhalos = distance_ratio(there, z_source, cosmology=simulation.cosmology)
    sigma_v = lenses.velocity_dispersion(theta_E, ratio)
    lens_mass = lenses.mass(sigma_v)
    catalogues = [
        _draw_subhalos(sky, slope, population, _mass_to_reach(population, mass))
        for sky, slope, mass in zip(skies, alpha, lens_mass, strict=True)
    ]
    num_subhalos = np.array([len(masses) for masses, _ in catalogues], dtype=np.int64)
    subhalos_mass = np.concatenate([masses for masses, _ in catalogues])
    # Uniform surface density within 2 theta_E of the lens centre.
    places = np.concatenate([places for _, places in catalogues])
    distance = np.repeat(2 * theta_E, num_subhalos) * np.sqrt(places[:, 0])
    angle = 2 * np.pi * places[:, 1]
    return Draws(
        simulation=simulation, split=split, index=index,
        alpha=alpha, theta_E=theta_E, q=q, phi=phi, x=x, y=y, z_lens=z_lens, z_source=z_source,
        sigma_v=sigma_v, lens_mass=lens_mass, source_sigma=source_sigma,
        subhalos_x=np.repeat(x, num_subhalos) + distance * np.cos(angle),
        subhalos_y=np.repeat(y, num_subhalos) + distance * np.sin(angle),
        subhalos_mass=subhalos_mass,
        subhalos_theta_E=lenses.einstein_radius(
            lenses.velocity_dispersion_of_mass(population.h * subhalos_mass), np.repeat(ratio_of_subhalos, num_subhalos)
        ),
        first_subhalo=np.concatenate([[0], np.cumsum(num_subhalos)]),
    )  # fmt: skip


def render_block(draws: Draws) -> np.ndarray:
    """Return the images of drawn skies: float32, (rows, num_pixels, num_pixels).

    With noise and normalisation as the camera says; the noise-free image of a row is the same
    image whatever the noise.
    """
    camera = draws.simulation.camera
    images = render_light(draws)
    if camera.signal_to_noise is not None:
        images += noise_sigma(images, draws.simulation)[:, None, None] * _noise(draws)
    if not camera.normalise:
        return images
    images = normalise(images)
    if camera.bits is None:
        return images
    highest = np.float32(2**camera.bits - 1)
    return np.rint(images * highest) / highest


def render_light(draws: Draws) -> np.ndarray:
    """Return the images before noise, in units of the source's central brightness: float32, (rows, ny, nx)."""
    camera = draws.simulation.camera
    block = _lenses(draws)
    if draws.simulation.engine == "lenstronomy":
        from raylens.physics import reference  # lenstronomy takes a second to import

        engine = reference.render
    else:
        engine = render.render
    return engine(
        block,
        num_pixels=camera.num_pixels,
        pixel_scale=camera.pixel_scale,
        psf_sigma=camera.psf_sigma,
        supersampling=camera.supersampling,
        source_cut=draws.simulation.source.cut,
    )


def noise_sigma(light: np.ndarray, simulation: Simulation) -> np.ndarray:
    """Return the standard deviation of each image's noise, in the unit of the images (rows, ny, nx).

    Where the signal is that of the frame, its sum is signal_to_noise times the noise of a sum over
    all pixels; where it is the peak, the brightest pixel is signal_to_noise times its noise.
    """
    camera = simulation.camera
    assert camera.signal_to_noise is not None
    if camera.noise_reference == "peak":
        return light.max(axis=(1, 2)) / np.float32(camera.signal_to_noise)
    return light.sum(axis=(1, 2)) / np.float32(camera.signal_to_noise * camera.num_pixels)


def _noise(draws: Draws) -> np.ndarray:
    """Return standard normal noise, float32, (rows, ny, nx)."""
    n = draws.simulation.camera.num_pixels
    noise = np.empty((len(draws.index), n, n), np.float32)
    key = _key(draws.simulation.seed, draws.split)
    for place, i in zip(noise, draws.index, strict=True):
        _generator(key, _NOISE, i).standard_normal(dtype=np.float32, out=place)
    return noise


def _lenses(draws: Draws) -> render.Lenses:
    radius = 2 * draws.theta_E
    convergence = np.zeros_like(radius)
    if draws.simulation.subhalos.compensation == "sheet":
        convergence = lenses.compensating_convergence(draws.sum_over_subhalos(draws.subhalos_theta_E), radius)
    return render.Lenses(
        theta_E=draws.theta_E, q=draws.q, phi=draws.phi, x=draws.x, y=draws.y, source_sigma=draws.source_sigma,
        sheet_convergence=convergence, sheet_radius=radius,
        subhalos_x=draws.subhalos_x, subhalos_y=draws.subhalos_y, subhalos_theta_E=draws.subhalos_theta_E,
        first_subhalo=draws.first_subhalo,
    )  # fmt: skip


def _slopes(simulation: Simulation, split: str) -> float | Uniform | Normal:
    """Return the distribution of alpha in a split; ValueError if the split is none of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"{split} is no split; the splits are {', '.join(SPLITS)}.")
    held = SPLITS[split]
    return simulation.subhalos.alpha if held is None else held


def _key(seed: int, split: str) -> np.ndarray:
    """Return the key of the random numbers that a seed and a split share with no other."""
    return np.frombuffer(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:16], dtype="<u8")


def _generator(key: np.ndarray, stream: int, index: int) -> np.random.Generator:
    """Return the generator of one stream of a row: Philox, Salmon et al. 2011."""
    # The counter's high words name the stream and the row; 2^128 numbers lie between two of them.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, stream, int(index)]))


def _mass_to_reach(population: Subhalos, lens_mass: float) -> float:
    return population.mass_fraction * lens_mass if population.mass_total is None else population.mass_total


def _draw_subhalos(
    sky: np.random.Generator, alpha: float, population: Subhalos, mass_to_reach: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the masses [Msun], (N,), and two numbers in [0, 1) for the place of each, (N, 2).

    The subhalo that crosses `mass_to_reach` is the last.
    """
    drawn = np.empty((0, 3))
    while True:
        # Three numbers a subhalo, in its turn: how many are drawn at once does not matter.
        drawn = np.concatenate([drawn, sky.random((max(_NUM_DRAWN_AT_ONCE, len(drawn)), 3))])
        masses = mass_quantile(
            drawn[:, 0],
            alpha=alpha,
            mass_min=population.mass_min,
            mass_max=population.mass_max,
            mass_function=population.mass_function,
        )
        num = 1 + int(np.searchsorted(np.cumsum(masses), mass_to_reach))
        if num <= len(masses):
            return masses[:num], drawn[:num, 1:]
        if len(masses) > 10 * MAX_NUM_SUBHALOS:
            raise ValueError(
                f"over {len(masses):,} subhaloes reach less than {mass_to_reach:.2g} Msun; "
                "raise subhalos.mass_min or lower subhalos.mass_fraction."
            )
