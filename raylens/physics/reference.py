"""The reference engine: the same light as `render.render`, by lenstronomy, in double precision.

lenstronomy traces, blurs and averages; the frame has the same border, so that light from beyond
it blurs in here too. Some thirty times slower.
"""

from __future__ import annotations

import numpy as np
from lenstronomy.Data.imaging_data import ImageData
from lenstronomy.Data.psf import PSF
from lenstronomy.ImSim.image_model import ImageModel
from lenstronomy.LensModel.lens_model import LensModel
from lenstronomy.LightModel.light_model import LightModel
from lenstronomy.Util.param_util import phi_q2_ellipticity
from lenstronomy.Util.util import sigma2fwhm

from raylens.physics.lenses import sheet_deflection
from raylens.physics.render import PSF_REACH, Lenses, num_border_pixels, ray_positions


def render(
    lenses: Lenses,
    *,
    num_pixels: int,
    pixel_scale: float,
    psf_sigma: float,
    supersampling: int,
    source_cut: float | None = None,
) -> np.ndarray:
    """Return the images of a block: float32, (images, num_pixels, num_pixels); units as in `render.render`."""
    border = num_border_pixels(psf_sigma=psf_sigma, pixel_scale=pixel_scale)
    num_padded = num_pixels + 2 * border
    corner = ray_positions(num_padded, pixel_scale=pixel_scale, supersampling=1, border=0)[0]
    pixels = ImageData(
        image_data=np.zeros((num_padded, num_padded)),
        ra_at_xy_0=corner,
        dec_at_xy_0=corner,
        transform_pix2angle=np.eye(2) * pixel_scale,
    )
    psf = PSF(psf_type="NONE")
    if psf_sigma > 0:
        psf = PSF(psf_type="GAUSSIAN", fwhm=sigma2fwhm(psf_sigma), truncation=PSF_REACH, pixel_size=pixel_scale)
    images = np.empty((len(lenses.q), num_pixels, num_pixels), np.float32)
    for i, image in enumerate(images):
        sigma = lenses.source_sigma[i]
        model = ImageModel(
            pixels,
            psf,
            lens_model_class=_LensModel(lenses, i),
            source_model_class=_Source(source_cut),
            kwargs_numerics={"supersampling_factor": supersampling, "supersampling_convolution": supersampling > 1},
        )
        # An amplitude of 2 pi sigma^2 / pixel area is a central brightness of 1 a pixel.
        source = {"amp": 2 * np.pi * sigma**2 / pixel_scale**2, "sigma": sigma, "center_x": 0, "center_y": 0}
        padded = model.image(_LensModel.parameters(lenses, i), [source])
        image[:] = padded[border : border + num_pixels, border : border + num_pixels]
    return images


class _Source(LightModel):
    """lenstronomy's round Gaussian, dark beyond a radius."""

    def __init__(self, cut: float | None) -> None:
        super().__init__(["GAUSSIAN"])
        self._cut = np.inf if cut is None else cut

    def surface_brightness(self, x, y, kwargs_list, k=None):
        light = super().surface_brightness(x, y, kwargs_list, k=k)
        return np.where(np.hypot(x, y) <= self._cut, light, 0.0)


class _LensModel(LensModel):
    """lenstronomy's lens model and the sheet, which it does not have as a disc."""

    def __init__(self, lenses: Lenses, i: int) -> None:
        super().__init__(["SIE"] + ["SIS"] * int(lenses.first_subhalo[i + 1] - lenses.first_subhalo[i]))
        self._centre = lenses.x[i], lenses.y[i]
        self._sheet = {"convergence": lenses.sheet_convergence[i], "radius": lenses.sheet_radius[i]}

    def ray_shooting(self, x, y, kwargs, k=None):
        beta_x, beta_y = super().ray_shooting(x, y, kwargs, k=k)
        alpha_x, alpha_y = sheet_deflection(x - self._centre[0], y - self._centre[1], **self._sheet)
        return beta_x - alpha_x, beta_y - alpha_y

    @staticmethod
    def parameters(lenses: Lenses, i: int) -> list[dict[str, float]]:
        e1, e2 = phi_q2_ellipticity(lenses.phi[i], lenses.q[i])
        own = slice(lenses.first_subhalo[i], lenses.first_subhalo[i + 1])
        main = {"theta_E": lenses.theta_E[i], "e1": e1, "e2": e2, "center_x": lenses.x[i], "center_y": lenses.y[i]}
        return [main] + [
            {"theta_E": theta_E, "center_x": x, "center_y": y}
            for x, y, theta_E in zip(
                lenses.subhalos_x[own], lenses.subhalos_y[own], lenses.subhalos_theta_E[own], strict=True
            )
        ]
