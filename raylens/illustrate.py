"""One simulation to what a person wants to see of it: a few populations, and one lens opened up.

The result lies in the dataset as `illustration.json`, so that a report can draw the paper's
figures 2 and 3 without simulating anything.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from raylens.config import SPLITS, Simulation
from raylens.physics import lenses
from raylens.physics.render import ray_positions
from raylens.simulate import MAX_NUM_SUBHALOS, Draws, draw_block, render_block, typical_num_subhalos


def illustration(simulation: Simulation) -> str:
    """Return as JSON: the subhaloes of one lens at each held slope, and one lens in full.

    Slopes at which a lens would hold too many subhaloes to be drawn are left out; the lens in full
    is one of the test set, unless that is among them.
    """
    splits = ["test", *(split for split, alpha in SPLITS.items() if alpha is not None)]
    drawable = [split for split in splits if typical_num_subhalos(simulation, split) <= MAX_NUM_SUBHALOS]
    populations = {split: draw_block(simulation, [0], split) for split in drawable if SPLITS[split] is not None}
    draws = draw_block(simulation, [0], drawable[0])
    values = {
        "populations": [_population(draws) for draws in populations.values()],
        "example": {
            **_population(draws),
            "theta_E": float(draws.theta_E[0]),
            "q": float(draws.q[0]),
            "phi": float(draws.phi[0]),
            "z_source": float(draws.z_source[0]),
            "source_sigma": float(draws.source_sigma[0]),
            "frame": simulation.camera.num_pixels * simulation.camera.pixel_scale,  # side [arcsec]
            "image": _rounded(render_block(draws)[0]),
            "convergence": _rounded(_convergence(draws)),
        },
    }
    return json.dumps(values)


def _population(draws: Draws) -> dict[str, Any]:
    return {
        "alpha": float(draws.alpha[0]),
        "x": _rounded(draws.subhalos_x),
        "y": _rounded(draws.subhalos_y),
        "mass": _rounded(draws.subhalos_mass),
    }


def _convergence(draws: Draws) -> np.ndarray:
    """Return the surface density of a drawn lens in critical units, on half pixels."""
    camera = draws.simulation.camera
    axis = ray_positions(camera.num_pixels, pixel_scale=camera.pixel_scale, supersampling=2, border=0)
    x, y = np.meshgrid(axis - draws.x[0], axis - draws.y[0])
    cos_phi, sin_phi = np.cos(draws.phi[0]), np.sin(draws.phi[0])
    along, across = cos_phi * x + sin_phi * y, cos_phi * y - sin_phi * x
    convergence = lenses.sie_convergence(along, across, theta_E=draws.theta_E[0], q=draws.q[0])
    for halo_x, halo_y, theta_E in zip(draws.subhalos_x, draws.subhalos_y, draws.subhalos_theta_E, strict=True):
        distance = np.hypot(x + draws.x[0] - halo_x, y + draws.y[0] - halo_y)
        convergence += theta_E / (2 * np.maximum(distance, camera.pixel_scale / 4))  # finite where a ray meets a centre
    if draws.simulation.subhalos.compensation == "sheet":
        radius = 2 * draws.theta_E[0]
        sheet = lenses.compensating_convergence(draws.subhalos_theta_E.sum(), radius)
        convergence += np.where(np.hypot(x, y) < radius, sheet, 0)
    return np.minimum(convergence, 1e3)


def _rounded(values: np.ndarray) -> list[Any]:
    """Return an array as nested lists of numbers of four digits."""
    return np.vectorize(lambda value: float(f"{value:.4g}"), otypes=[float])(values).tolist()
