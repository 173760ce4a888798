"""The fast kernel: lenses and subhaloes to the light in each pixel, before noise, in single precision.

One image costs a pixel-subhalo pair for each of about 4,600 rays and 400 subhaloes, some four
times all the rest. So the sum over subhaloes is one fused loop without temporaries, four rays at a
time, which the compiler turns into vector instructions with approximate reciprocal roots (and a
Newton step). There are no threads: Ray gives the parallelism. The rays cover the frame and a
border as wide as the point-spread function reaches, so that light beyond the frame blurs into it.

Single precision costs about 3e-7 arcsec in a deflection. Last bits differ between kinds of
processor, with the width of their vectors.

Symbols of this file: arrays run over images, then rows (y), then columns (x), all in arcsec.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import binding

# The profile is singular at its centre: there 0 / sqrt(floor) gives 0, where 0 / 0 would give nan,
# which fastmath may not even notice.
FLOOR = np.float32(1e-18)

# Reach of the point-spread function in standard deviations: 6e-7 of its light lies beyond.
PSF_REACH = 5.0

# Where the ellipsoid's series is cut: its remainder is below single precision.
SERIES_TOLERANCE = 1e-8

# The cache beside this file serves every later process on this machine.
_compiled: Callable[..., Any] = numba.njit(fastmath=True, error_model="numpy", cache=True)


class Lenses(NamedTuple):
    """The lenses of a block of images: float64 arrays, one value an image, but for the subhaloes."""

    theta_E: np.ndarray
    q: np.ndarray
    phi: np.ndarray
    x: np.ndarray
    y: np.ndarray
    source_sigma: np.ndarray
    sheet_convergence: np.ndarray
    sheet_radius: np.ndarray
    subhalos_x: np.ndarray  # of all images, one after the other
    subhalos_y: np.ndarray
    subhalos_theta_E: np.ndarray
    first_subhalo: np.ndarray  # int64, one more than images: image i has [first[i], first[i + 1])


def processor() -> str:
    """Return the kind of processor for which the kernel is compiled, which decides the last bits of an image."""
    return str(numba.config.CPU_NAME or binding.get_host_cpu_name())  # type: ignore[attr-defined]


def num_border_pixels(*, psf_sigma: float, pixel_scale: float) -> int:
    """Return how many pixels beyond each edge of the frame send light into it."""
    return math.ceil(PSF_REACH * psf_sigma / pixel_scale - 1e-9)


def ray_positions(num_pixels: int, *, pixel_scale: float, supersampling: int, border: int) -> np.ndarray:
    """Return the coordinates of the rays along an axis [arcsec], float64, symmetric about 0."""
    num_rays = (num_pixels + 2 * border) * supersampling
    return (np.arange(num_rays) - (num_rays - 1) / 2) * (pixel_scale / supersampling)


def render(
    lenses: Lenses,
    *,
    num_pixels: int,
    pixel_scale: float,
    psf_sigma: float,
    supersampling: int,
    source_cut: float | None = None,
) -> np.ndarray:
    """Return the images of a block: float32, (images, num_pixels, num_pixels).

    The unit is the surface brightness at the centre of the source, averaged over the pixel's
    supersampling^2 rays after the point-spread function. Beyond the radius `source_cut` [arcsec] a source is dark.
    """
    border = num_border_pixels(psf_sigma=psf_sigma, pixel_scale=pixel_scale)
    rays = ray_positions(num_pixels, pixel_scale=pixel_scale, supersampling=supersampling, border=border)
    # The kernel takes rays by four; the last columns of an odd frame are computed and dropped.
    columns = np.pad(rays, (0, -len(rays) % 4), mode="edge").astype(np.float32)
    light = np.empty((len(lenses.q), len(rays), len(rays)), np.float32)
    _trace(columns, rays.astype(np.float32), *(_single(field) for field in lenses), light)
    np.exp(light, out=light)
    if source_cut is not None:
        dimmest = np.exp(-0.5 * (source_cut / lenses.source_sigma) ** 2).astype(np.float32)
        light[light < dimmest[:, None, None]] = 0
    psf = gaussian_taps(psf_sigma * supersampling / pixel_scale, border * supersampling)
    return _observe(light, psf, supersampling, num_pixels)


def gaussian_taps(sigma: float, reach: int) -> np.ndarray:
    """Return the 2 reach + 1 weights of a sampled Gaussian, float32; sigma in samples."""
    if reach == 0:
        return np.ones(1, np.float32)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    # Normalised after truncation; otherwise its wings would take flux with them.
    return (taps / taps.sum()).astype(np.float32)


def _single(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32) if values.dtype == np.float64 else values


@_compiled
def _trace(
    columns, rows, theta_E, q, phi, lens_x, lens_y, source_sigma, sheet_convergence, sheet_radius,
    subhalos_x, subhalos_y, subhalos_theta_E, first_subhalo, exponent,
):  # fmt: skip
    """Trace rays to the source plane and write the exponent of the Gaussian source there."""
    num_columns = len(columns)
    alpha_x = np.empty(num_columns, np.float32)
    alpha_y = np.empty(num_columns, np.float32)
    # Six arrays, not the rows of one, which the compiler could not know to be apart.
    e_x, e_y = np.empty(num_columns, np.float32), np.empty(num_columns, np.float32)
    square_x, square_y = np.empty(num_columns, np.float32), np.empty(num_columns, np.float32)
    sum_x, sum_y = np.empty(num_columns, np.float32), np.empty(num_columns, np.float32)
    for image in range(len(q)):
        first, last = first_subhalo[image], first_subhalo[image + 1]
        halo_x, halo_y, halo_theta_E = subhalos_x[first:last], subhalos_y[first:last], subhalos_theta_E[first:last]
        scale = np.float32(-0.5) / source_sigma[image] ** 2
        series = _sie_series(q[image])
        sie_scale = np.float32(2) * theta_E[image] * math.sqrt(q[image]) / (np.float32(1) + q[image])
        cos_phi, sin_phi = math.cos(phi[image]), math.sin(phi[image])
        for row in range(len(rows)):
            _add_subhalos(columns, rows[row], halo_x, halo_y, halo_theta_E, alpha_x, alpha_y)
            _add_sie(
                columns, rows[row], sie_scale, q[image], series, cos_phi, sin_phi, lens_x[image], lens_y[image],
                alpha_x, alpha_y, e_x, e_y, square_x, square_y, sum_x, sum_y,
            )  # fmt: skip
            if sheet_convergence[image] != 0:
                _add_sheet(
                    columns, rows[row], sheet_convergence[image], sheet_radius[image], lens_x[image], lens_y[image],
                    alpha_x, alpha_y,
                )  # fmt: skip
            _gaussian_exponent(columns, rows[row], scale, alpha_x, alpha_y, exponent[image, row])


@_compiled
def _add_subhalos(columns, y, halo_x, halo_y, halo_theta_E, alpha_x, alpha_y):
    """Set a row of deflections to the sum over isothermal spheres; vectorised over the spheres."""
    for column in range(0, len(columns), 4):
        x0, x1, x2, x3 = columns[column], columns[column + 1], columns[column + 2], columns[column + 3]
        ax0 = ax1 = ax2 = ax3 = np.float32(0)
        ay0 = ay1 = ay2 = ay3 = np.float32(0)
        for halo in range(len(halo_x)):
            theta_E = halo_theta_E[halo]
            dy = y - halo_y[halo]
            dy2 = dy * dy + FLOOR
            dx0, dx1, dx2, dx3 = x0 - halo_x[halo], x1 - halo_x[halo], x2 - halo_x[halo], x3 - halo_x[halo]
            scale0 = theta_E * (np.float32(1) / math.sqrt(dx0 * dx0 + dy2))
            scale1 = theta_E * (np.float32(1) / math.sqrt(dx1 * dx1 + dy2))
            scale2 = theta_E * (np.float32(1) / math.sqrt(dx2 * dx2 + dy2))
            scale3 = theta_E * (np.float32(1) / math.sqrt(dx3 * dx3 + dy2))
            ax0 += scale0 * dx0
            ax1 += scale1 * dx1
            ax2 += scale2 * dx2
            ax3 += scale3 * dx3
            ay0 += scale0 * dy
            ay1 += scale1 * dy
            ay2 += scale2 * dy
            ay3 += scale3 * dy
        alpha_x[column], alpha_x[column + 1], alpha_x[column + 2], alpha_x[column + 3] = ax0, ax1, ax2, ax3
        alpha_y[column], alpha_y[column + 1], alpha_y[column + 2], alpha_y[column + 3] = ay0, ay1, ay2, ay3


@_compiled
def _sie_series(q):
    """Return the coefficients (-f)^n / (2n + 1), f = (1 - q) / (1 + q), of the ellipsoid's series.

    With e the unit vector (q x, y) / |(q x, y)| as a complex number, the deflection is
    2 theta_E sqrt(q) / (1 + q) times the sum over n of these times e^(2n + 1): Tessore & Metcalf 2015,
    A&A 580, A79, at the isothermal slope. It needs no arc functions and holds at q = 1.
    """
    f = (1.0 - q) / (1.0 + q)
    num_terms = 1 if f < SERIES_TOLERANCE else 1 + math.ceil(math.log(SERIES_TOLERANCE) / math.log(f))
    coefficients = np.empty(num_terms, np.float32)
    power = 1.0
    for n in range(num_terms):
        coefficients[n] = power / (2 * n + 1)
        power *= -f
    return coefficients


@_compiled
def _add_sie(
    columns, y, scale, q, series, cos_phi, sin_phi, lens_x, lens_y,
    alpha_x, alpha_y, e_x, e_y, square_x, square_y, sum_x, sum_y,
):  # fmt: skip
    """Add the ellipsoid to a row of deflections; vectorised over the row."""
    _unit_vectors(columns, y, q, cos_phi, sin_phi, lens_x, lens_y, e_x, e_y, square_x, square_y)
    sum_x[:] = np.float32(0)
    sum_y[:] = np.float32(0)
    for n in range(len(series) - 1, -1, -1):
        _horner(series[n], square_x, square_y, sum_x, sum_y)
    _add_rotated(scale * cos_phi, scale * sin_phi, e_x, e_y, sum_x, sum_y, alpha_x, alpha_y)


# One loop along a row each, over arrays of its own: so the compiler vectorises them, which is worth
# a tenth of the image.
@_compiled
def _unit_vectors(columns, y, q, cos_phi, sin_phi, lens_x, lens_y, e_x, e_y, square_x, square_y):
    """Set e, and its square as a complex number, along a row."""
    dy = y - lens_y
    for column in range(len(columns)):
        dx = columns[column] - lens_x
        major, minor = q * (cos_phi * dx + sin_phi * dy), cos_phi * dy - sin_phi * dx
        inverse = np.float32(1) / math.sqrt(major * major + minor * minor + FLOOR)
        e_x[column], e_y[column] = major * inverse, minor * inverse
        square_x[column] = inverse * inverse * (major * major - minor * minor)
        square_y[column] = inverse * inverse * (np.float32(2) * major * minor)


@_compiled
def _horner(coefficient, square_x, square_y, sum_x, sum_y):
    """Replace the complex sum by coefficient + square * sum along a row."""
    for column in range(len(sum_x)):
        real = coefficient + square_x[column] * sum_x[column] - square_y[column] * sum_y[column]
        sum_y[column] = square_x[column] * sum_y[column] + square_y[column] * sum_x[column]
        sum_x[column] = real


@_compiled
def _add_rotated(cos_phi, sin_phi, e_x, e_y, sum_x, sum_y, alpha_x, alpha_y):
    """Add e * sum, turned from the major axis to the frame and scaled, to a row of deflections."""
    for column in range(len(sum_x)):
        major = e_x[column] * sum_x[column] - e_y[column] * sum_y[column]
        minor = e_x[column] * sum_y[column] + e_y[column] * sum_x[column]
        alpha_x[column] += cos_phi * major - sin_phi * minor
        alpha_y[column] += sin_phi * major + cos_phi * minor


@_compiled
def _add_sheet(columns, y, convergence, radius, lens_x, lens_y, alpha_x, alpha_y):
    """Add the compensating disc to a row of deflections: within it as a sheet, beyond it as a point."""
    dy = y - lens_y
    radius2 = radius * radius
    for column in range(len(columns)):
        dx = columns[column] - lens_x
        scale = convergence * radius2 / max(dx * dx + dy * dy, radius2)
        alpha_x[column] += scale * dx
        alpha_y[column] += scale * dy


@_compiled
def _gaussian_exponent(columns, y, scale, alpha_x, alpha_y, exponent):
    """Set scale * |beta|^2 along a row, where beta is where its rays meet the source plane."""
    for column in range(len(exponent)):
        beta_x, beta_y = columns[column] - alpha_x[column], y - alpha_y[column]
        exponent[column] = scale * (beta_x * beta_x + beta_y * beta_y)


@_compiled
def _observe(light, psf, supersampling, num_pixels):
    """Blur with a separable point-spread function, drop the border, average rays into pixels."""
    num_images, num_rays, _ = light.shape
    inner = num_pixels * supersampling
    images = np.zeros((num_images, num_pixels, num_pixels), np.float32)
    blurred = np.empty((num_rays, inner), np.float32)
    line = np.empty(inner, np.float32)
    share = np.float32(1) / np.float32(supersampling * supersampling)
    for image in range(num_images):
        for row in range(num_rays):
            blurred[row, :] = np.float32(0)
            for tap in range(len(psf)):
                for column in range(inner):
                    blurred[row, column] += psf[tap] * light[image, row, column + tap]
        for row in range(inner):
            line[:] = np.float32(0)
            for tap in range(len(psf)):
                for column in range(inner):
                    line[column] += psf[tap] * blurred[row + tap, column]
            for column in range(inner):
                images[image, row // supersampling, column // supersampling] += share * line[column]
    return images
