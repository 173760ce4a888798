"""The lenses: positions in the image plane to deflections, and Einstein radii to masses.

Symbols of this file: x, y are image-plane positions relative to the lens [arcsec], arrays of one
shape, here (ny, nx). theta_E is the Einstein radius [arcsec], in the intermediate-axis convention:
pi theta_E^2 is the area inside the critical curve, whatever q. q is the minor-over-major axis
ratio of the mass. Deflections [arcsec] and convergences (surface density in units of the critical
one) are shaped like x. At the origin, where the profiles are singular, deflections are 0, their
mean over directions, and convergences are infinite.
"""

from __future__ import annotations

import numpy as np

C_KM_S = 299_792.458  # exact, SI
ARCSEC = np.pi / 648_000  # [rad]
A_1D = 1200.0  # velocity scale of eq. 2.3 [km/s], section 2.1
BETA = 1.0 / 3.0  # exponent of eq. 2.3, section 2.1


def sie_deflection(x: np.ndarray, y: np.ndarray, *, theta_E: float, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the deflection of a singular isothermal ellipsoid with its major axis along x.

    At q = 1 the formula's limit is taken, the singular isothermal sphere.

    Raises
    ------
    ValueError
        If q is outside (0, 1].

    References
    ----------
    Kormann, Schneider & Bartelmann 1994, A&A 284, 285.

    Examples
    --------
    >>> sie_deflection(np.array([2.0]), np.array([0.0]), theta_E=1.5, q=1.0)
    (array([1.5]), array([0.]))
    """
    _require_axis_ratio(q)
    if q == 1:
        return sis_deflection(x, y, theta_E=theta_E)
    f = np.sqrt((1 - q) * (1 + q))
    radius = np.hypot(q * x, y)
    safe = np.where(radius > 0, radius, 1.0)
    scale = theta_E * np.sqrt(q) / f
    return scale * np.arctan(f * x / safe), scale * np.arctanh(f * y / safe)


def sis_deflection(x: np.ndarray, y: np.ndarray, *, theta_E: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the deflection of a singular isothermal sphere: theta_E, away from its centre."""
    radius = np.hypot(x, y)
    scale = theta_E / np.where(radius > 0, radius, 1.0)
    return scale * x, scale * y


def sheet_deflection(
    x: np.ndarray, y: np.ndarray, *, convergence: float, radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the deflection of a uniform disc of a given convergence and radius [arcsec]."""
    scale = convergence * radius**2 / np.maximum(x**2 + y**2, radius**2)
    return scale * x, scale * y


def sie_convergence(x: np.ndarray, y: np.ndarray, *, theta_E: float, q: float) -> np.ndarray:
    """Return the convergence of the ellipsoid of `sie_deflection`."""
    _require_axis_ratio(q)
    with np.errstate(divide="ignore"):
        return theta_E * np.sqrt(q) / (2 * np.hypot(q * x, y))


def compensating_convergence(sum_theta_E: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Return the convergence of the sheet that takes the subhaloes' mass out of a disc [dimensionless].

    A singular isothermal sphere holds pi theta_E R (times the critical surface density) within R of
    its centre. The sheet, of that radius R [arcsec], holds the negative of their sum; at the
    centre of a uniform population the convergences then cancel exactly, and at R / 2, where the ring
    lies, 97 % of the deflection does.
    """
    return -sum_theta_E / radius


def velocity_dispersion(theta_E: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Return the velocity dispersion [km/s] of a lens, eq. 2.2; ratio is D_ds / D_s."""
    return C_KM_S * np.sqrt(theta_E * ARCSEC / (4 * np.pi * ratio))


def einstein_radius(sigma_v: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """Return the Einstein radius [arcsec] at a velocity dispersion [km/s], eq. 2.2 solved for it."""
    return 4 * np.pi * (sigma_v / C_KM_S) ** 2 * ratio / ARCSEC


def mass(sigma_v: np.ndarray) -> np.ndarray:
    """Return the mass [Msun] at a velocity dispersion [km/s].

    References
    ----------
    Eq. 2.3, read as Munari et al. 2013, MNRAS 430, 2638: sigma = A_1D (M / 1e15 Msun)^beta, without
    their factor h(z), as the paper does. As printed the fraction and the exponent are upside down.
    """
    return 1e15 * (sigma_v / A_1D) ** (1 / BETA)


def velocity_dispersion_of_mass(mass: np.ndarray) -> np.ndarray:
    """Return the velocity dispersion [km/s] at a mass [Msun], eq. 2.3 solved for it."""
    return A_1D * (mass / 1e15) ** BETA


def _require_axis_ratio(q: float) -> None:
    if not 0 < q <= 1:
        raise ValueError(f"q is minor/major, so it must lie in (0, 1]; got {q}. For a major/minor ratio pass 1/q.")
