"""What both the sky and the network need to know of an image: its axes and its scale.

image[row, column]: y grows with row and x with column; pixel centres lie at
(i - (n - 1) / 2) * pixel_scale [arcsec].
"""

from __future__ import annotations

import numpy as np


def normalise(images: np.ndarray) -> np.ndarray:
    """Return images (..., ny, nx), each scaled to minimum 0 and maximum 1; a blank one becomes 0."""
    low = images.min(axis=(-2, -1), keepdims=True)
    span = images.max(axis=(-2, -1), keepdims=True) - low
    return (images - low) / np.where(span > 0, span, 1)
