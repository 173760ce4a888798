"""What labels alone predict: the mean of one, given some others, as a polynomial in their logarithms.

Fitted on training labels; stands beside every result of a network, which sees images.
"""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np

from raylens.config import Settings

_DEGREE = 5
_NUM_FITTED = 1 << 18  # images; more would not move a mean


class Baseline(Settings):
    """A label as a function of others; of none of them, a constant."""

    given: list[str]  # columns of a dataset, positive
    low: list[float]  # lowest logarithm of each in the training set; what lies beyond is taken for it
    high: list[float]
    coefficients: list[float]  # of the products of up to five of the scaled logarithms

    def predict(self, columns: dict[str, np.ndarray], num_images: int) -> np.ndarray:
        """Return the predictions (images,) from columns (images,)."""
        return self.terms(columns, num_images) @ np.array(self.coefficients)

    def terms(self, columns: dict[str, np.ndarray], num_images: int) -> np.ndarray:
        """Return what the coefficients weigh (images, terms)."""
        scaled = []
        for name, low, high in zip(self.given, self.low, self.high, strict=True):
            if low < high:  # what does not vary tells nothing
                logarithm = np.log(columns[name].astype(np.float64))
                scaled.append(np.clip(2 * (logarithm - low) / (high - low) - 1, -1, 1))
        terms = [
            np.prod(factors, axis=0)
            for degree in range(1, _DEGREE + 1)
            for factors in combinations_with_replacement(scaled, degree)
        ]
        return np.stack([np.ones(num_images), *terms], axis=1)


def fit(target: np.ndarray, given: dict[str, np.ndarray]) -> Baseline:
    """Return the least-squares fit of a label (images,) to others (images,), all of them positive."""
    target = target[:_NUM_FITTED].astype(np.float64)
    given = {name: values[:_NUM_FITTED] for name, values in given.items()}
    logarithms = [np.log(values.astype(np.float64)) for values in given.values()]
    baseline = Baseline(
        given=list(given),
        low=[float(values.min()) for values in logarithms],
        high=[float(values.max()) for values in logarithms],
        coefficients=[],
    )
    coefficients, *_ = np.linalg.lstsq(baseline.terms(given, len(target)), target, rcond=None)
    return baseline.override({"coefficients": coefficients.tolist()})
