"""Distances in the sky, from astropy: redshifts in, the ratio that lensing needs out.

A cosmology is named as in astropy. Those here are flat, so comoving distances add up, and they enter
lensing only as D_ds / D_s.
"""

from __future__ import annotations

import numpy as np
from astropy.cosmology import WMAP9, FlatLambdaCDM, Planck18

COSMOLOGIES: dict[str, FlatLambdaCDM] = {"Planck18": Planck18, "WMAP9": WMAP9}


def distance_ratio(z_lens: np.ndarray, z_source: np.ndarray, *, cosmology: str) -> np.ndarray:
    """Return D_ds / D_s, lens to source over observer to source.

    Parameters
    ----------
    z_lens, z_source : float arrays of one shape
        Redshifts, 0 < z_lens < z_source.
    cosmology
        One of COSMOLOGIES.

    Returns
    -------
    float array shaped like z_lens
        Ratio of angular-diameter distances, in (0, 1).

    Examples
    --------
    >>> round(float(distance_ratio(np.array([0.5]), np.array([1.77]), cosmology="Planck18")[0]), 4)
    0.6069
    """
    distances = COSMOLOGIES[cosmology]
    return 1.0 - _comoving_distance(z_lens, distances) / _comoving_distance(z_source, distances)


def _comoving_distance(z: np.ndarray, cosmology: FlatLambdaCDM) -> np.ndarray:
    # An integral for each redshift: where all images share one, it is done once.
    values, places = np.unique(z, return_inverse=True)
    return cosmology.comoving_distance(values).to_value("Mpc")[places].reshape(np.shape(z))
