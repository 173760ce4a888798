"""The subhalo mass function dN/dM proportional to M^alpha between two masses (eq. 2.1), in solar masses.

Eq. 2.1 prints the exponent -alpha; the paper's values are negative everywhere, so alpha itself is
the exponent here. Subhaloes are drawn until their mass reaches a set share of the lens mass.
As "decades" the masses are mass_min and its tenfolds up to mass_max alone, the k-th of them, from 1,
in proportion to k^alpha: that is how the paper's released code reads the equation.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import root

from raylens.config import MassFunction

# Section 3.1.1 of the paper: the mean number of subhaloes at two slopes.
PAPER_MEAN_NUM_SUBHALOS = {-1.7: 200.0, -2.5: 700.0}


def mass_quantile(
    u: np.ndarray, *, alpha: float, mass_min: float, mass_max: float, mass_function: MassFunction = "power-law"
) -> np.ndarray:
    """Return the mass [Msun] below which a share u, in [0, 1), of the subhaloes lies."""
    if mass_function == "decades":
        masses, shares = _decades(alpha, mass_min, mass_max)
        return masses[np.searchsorted(np.cumsum(shares[:-1]), u, side="right")]
    if alpha == -1:
        return mass_min * (mass_max / mass_min) ** u
    power = alpha + 1
    # By way of logarithms, which keep their digits where the power is close to 0.
    return mass_min * np.exp(np.log1p(u * np.expm1(power * np.log(mass_max / mass_min))) / power)


def mean_power(
    power: int, *, alpha: float, mass_min: float, mass_max: float, mass_function: MassFunction = "power-law"
) -> float:
    """Return the mean of M^power over the mass function [Msun^power]."""
    if mass_function == "decades":
        masses, shares = _decades(alpha, mass_min, mass_max)
        return float(shares @ masses**power)
    return _integral(alpha + power, mass_min, mass_max) / _integral(alpha, mass_min, mass_max)


def mean_num_subhalos(
    *, alpha: float, mass_min: float, mass_max: float, mass_to_reach: float, mass_function: MassFunction = "power-law"
) -> float:
    """Return the mean number of subhaloes drawn until their mass reaches `mass_to_reach` [Msun].

    The draw that crosses the limit counts, and it is heavier than most: by renewal theory the mean
    is B / <M> + <M^2> / (2 <M>^2) where B is the mass to reach and much above <M>.
    """
    mean, mean_square = (
        mean_power(power, alpha=alpha, mass_min=mass_min, mass_max=mass_max, mass_function=mass_function)
        for power in (1, 2)
    )
    return mass_to_reach / mean + mean_square / (2 * mean**2)


def solve_mass_limits(
    mass_to_reach: float, targets: dict[float, float] = PAPER_MEAN_NUM_SUBHALOS
) -> tuple[float, float]:
    """Return the (mass_min, mass_max) [Msun] at which the mean number is as stated at two slopes.

    The paper does not print the limits of its mass function, but it states the mean number of
    subhaloes at two slopes (section 3.1.1). Taken as `mass_to_reach` / <M>, these are two equations
    for two unknowns.

    Raises
    ------
    ValueError
        If no two limits give these means.

    Examples
    --------
    >>> mass_min, mass_max = solve_mass_limits(1.452e12)  # a tenth of the fixed lens
    >>> f"{mass_min:.2e} {mass_max:.2e}"
    '7.40e+08 1.70e+11'
    """

    def excess(log_limits: np.ndarray) -> list[float]:
        low, high = np.exp(log_limits)
        means = [mean_power(1, alpha=alpha, mass_min=low, mass_max=high) for alpha in targets]
        return [np.log(mass_to_reach / mean / number) for mean, number in zip(means, targets.values(), strict=True)]

    # Between these starts, a tenth of the mean mass and ten times it, every sensible solution is found.
    mean_mass = mass_to_reach / np.mean(list(targets.values()))
    solution = root(excess, np.log([0.1 * mean_mass, 10 * mean_mass]), tol=1e-12)
    if not solution.success:
        raise ValueError(f"no mass limits give the mean numbers {targets} for a mass of {mass_to_reach:g} Msun.")
    low, high = np.exp(solution.x)
    return float(low), float(high)


def _decades(alpha: float, mass_min: float, mass_max: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the masses [Msun] of a mass function of decades, and the share of the subhaloes at each."""
    number = 1 + np.arange(1 + int(np.log10(mass_max / mass_min) + 1e-9))
    weights = number**alpha
    return mass_min * 10.0 ** (number - 1), weights / weights.sum()


def _integral(power: float, low: float, high: float) -> float:
    """Return the integral of M^power from low to high."""
    if power == -1:
        return float(np.log(high / low)) * low ** (power + 1)
    return low ** (power + 1) * float(np.expm1((power + 1) * np.log(high / low))) / (power + 1)
