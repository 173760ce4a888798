"""The paper's measures of a prediction (section 3), from true and predicted values.

gradient: slope of the straight line fitted to predicted against true. RMSE: root of the mean
squared error, predicted - true. sigma: half the width of the central 68 % of the errors.
bias: mean error. Populations differ, so the RMSE also stands over the standard deviation of the true
values, as relative_rmse: that of their mean, whatever the image, is 1. All but sigma come from sums,
which are added over batches, blocks and ranks and divided once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Sums:
    """What gradient, RMSE and bias need of a set of predictions; adding two joins their sets."""

    # number, true, predicted, true^2, true predicted, error, error^2, |error|
    values: np.ndarray = field(default_factory=lambda: np.zeros(8))

    @classmethod
    def of(cls, true: np.ndarray, predicted: np.ndarray) -> Self:
        """Return the sums over arrays of one shape; ValueError for two shapes, which would broadcast."""
        if np.shape(true) != np.shape(predicted):
            raise ValueError(f"true and predicted must have one shape; got {np.shape(true)} and {np.shape(predicted)}.")
        t, p = np.asarray(true, np.float64), np.asarray(predicted, np.float64)
        error = p - t
        sums = [value.sum() for value in (t, p, t * t, t * p, error, error * error, np.abs(error))]
        return cls(np.array([t.size, *sums]))

    def __add__(self, other: Self) -> Self:
        return type(self)(self.values + other.values)

    @property
    def num_images(self) -> int:
        return int(self.values[0])

    @property
    def gradient(self) -> float | None:
        """None where the true values do not vary."""
        n, t, p, tt, tp = self.values[:5]
        variance = n * tt - t * t
        # Equal numbers leave a variance of rounding errors.
        return float((n * tp - t * p) / variance) if variance > 1e-9 * n * tt else None

    @property
    def rmse(self) -> float:
        return float(np.sqrt(self.values[6] / self.values[0]))

    @property
    def bias(self) -> float:
        return float(self.values[5] / self.values[0])

    @property
    def mae(self) -> float:
        """Mean absolute error."""
        return float(self.values[7] / self.values[0])

    @property
    def sd(self) -> float | None:
        """Standard deviation of the true values; None where they do not vary."""
        n, t, _, tt = self.values[:4]
        variance = n * tt - t * t
        return float(np.sqrt(variance) / n) if variance > 1e-9 * n * tt else None


def sigma(errors: np.ndarray) -> float:
    """Return half the width of the central 68 % of the errors."""
    low, high = np.quantile(errors, [0.16, 0.84])
    return float(high - low) / 2


def measure(true: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """Return gradient, rmse, sigma, bias and relative_rmse of predictions; arrays (images,)."""
    sums = Sums.of(true, predicted)
    sd = sums.sd
    errors = np.asarray(predicted, np.float64) - np.asarray(true, np.float64)
    return {
        "gradient": sums.gradient,
        "rmse": sums.rmse,
        "sigma": sigma(errors),
        "bias": sums.bias,
        "relative_rmse": sums.rmse / sd if sd else None,
    }
