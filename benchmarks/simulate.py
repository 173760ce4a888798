"""Images per second and core: raylens, lenstronomy and caustics on the same skies, machine, thread and frame.

Run as `python benchmarks/simulate.py`. A whole image is the draws, the light of the padded frame, the
point-spread function, noise and normalisation; light is what stands before noise. The contestants take
turns in each repeat, so that a busy machine is busy for all of them, and the median repeat counts.

caustics has no Gaussian source (its Sersic has one to an approximate width), so that line is torch. Its SIE and
SIS functions are used in single precision in the two fastest ways we found: eager, with vmap over 32 subhaloes
at a time, which is what its BatchedPlane does with a chunk size (all at once takes 6 times longer, for want of
cache; one at a time 1.3 times), and under torch.compile, where the sum over subhaloes becomes one loop in C++.
Compiling takes up to half a minute and is not counted.
"""

import os

# Before the other imports: the libraries count their threads when they are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from caustics.lenses.func import reduced_deflection_angle_sie, reduced_deflection_angle_sis

from raylens import recipes, simulate
from raylens.physics import reference, render

SIMULATION = recipes.paper_fixed().simulation
REFERENCE = SIMULATION.override({"engine": "lenstronomy"})
CAMERA = {
    name: getattr(SIMULATION.camera, name) for name in ("num_pixels", "pixel_scale", "psf_sigma", "supersampling")
}
NUM_SUBHALOS_AT_ONCE = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=64, help="in each repeat")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    draws = simulate.draw_block(SIMULATION, range(options.images))
    lenses = simulate._lenses(draws)
    light = simulate.render_light(draws)
    compiled = torch.compile(caustics_deflection, dynamic=True)
    contestants = {
        ("whole image", "raylens"): lambda: whole_images(SIMULATION, options.images),
        ("whole image", "lenstronomy"): lambda: whole_images(REFERENCE, options.images),
        ("light", "raylens"): lambda: render.render(lenses, **CAMERA),
        ("light", "lenstronomy"): lambda: reference.render(lenses, **CAMERA),
        ("light", "caustics, eager"): lambda: caustics_light(lenses, caustics_deflection_in_chunks),
        ("light", "caustics, compiled"): lambda: caustics_light(lenses, compiled),
    }
    stages = {
        "draws": lambda: simulate.draw_block(SIMULATION, range(options.images)),
        "light": lambda: simulate.render_light(draws),
        "noise and normalisation": lambda: noise_and_normalisation(draws, light.copy()),
    }

    images = {contestant: make() for contestant, make in contestants.items()}  # compiles, too
    errors = {
        who: float(np.max(np.abs(images["light", who] - light)) / light.max())
        for what, who in contestants
        if what == "light"
    }
    assert max(errors.values()) < 1e-3, f"the contestants do not make the same image: {errors}"
    milliseconds = medians(contestants | stages, options.repeats, options.images)
    report(milliseconds, contestants, stages, errors, options)


def medians(timed: dict, repeats: int, num_images: int) -> dict:
    """Return the median milliseconds per image of each function, which take turns."""
    taken = {name: [] for name in timed}
    for _ in range(repeats):
        for name, make in timed.items():
            start = time.perf_counter()
            make()
            taken[name].append((time.perf_counter() - start) / num_images * 1e3)
    return {name: float(np.median(times)) for name, times in taken.items()}


def whole_images(simulation, num_images: int) -> np.ndarray:
    return simulate.render_block(simulate.draw_block(simulation, range(num_images)))


def noise_and_normalisation(draws: simulate.Draws, light: np.ndarray) -> np.ndarray:
    """As `simulate.render_block` does it."""
    light += simulate.noise_sigma(light, SIMULATION)[:, None, None] * simulate._noise(draws)
    return simulate.normalise(light)


def caustics_light(lenses: render.Lenses, deflection: Callable) -> np.ndarray:
    """Return the light of a block of images, on the frame and with the point-spread function of `render.render`."""
    border = render.num_border_pixels(psf_sigma=CAMERA["psf_sigma"], pixel_scale=CAMERA["pixel_scale"])
    axis = torch.from_numpy(
        render.ray_positions(CAMERA["num_pixels"], pixel_scale=CAMERA["pixel_scale"], supersampling=1, border=border)
    ).float()
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    psf = torch.from_numpy(render.gaussian_taps(CAMERA["psf_sigma"] / CAMERA["pixel_scale"], border))
    lens = {name: torch.from_numpy(values).float() for name, values in lenses._asdict().items()}
    main = [lens[name] for name in ("x", "y", "q", "phi", "theta_E")]
    halos = [lens[name] for name in ("subhalos_x", "subhalos_y", "subhalos_theta_E")]
    light = torch.empty(len(lenses.q), 1, len(axis), len(axis))
    for i, (first, last) in enumerate(zip(lenses.first_subhalo[:-1], lenses.first_subhalo[1:], strict=True)):
        main_x, main_y = reduced_deflection_angle_sie(*(values[i] for values in main), x, y)
        sum_x, sum_y = deflection(*(values[first:last] for values in halos), x, y)
        beta2 = (x - main_x - sum_x) ** 2 + (y - main_y - sum_y) ** 2
        light[i, 0] = torch.exp(beta2 * (-0.5 / lens["source_sigma"][i] ** 2))
    blurred = torch.nn.functional.conv2d(light, psf[None, None, :, None])
    return torch.nn.functional.conv2d(blurred, psf[None, None, None, :])[:, 0].numpy()


def caustics_deflection(halo_x, halo_y, halo_theta_E, x, y):
    """Return the sum of the deflections of the subhaloes, by vmap over them."""
    each = torch.func.vmap(lambda x0, y0, theta_E: reduced_deflection_angle_sis(x0, y0, theta_E, x, y))
    alpha_x, alpha_y = each(halo_x, halo_y, halo_theta_E)
    return alpha_x.sum(0), alpha_y.sum(0)


def caustics_deflection_in_chunks(halo_x, halo_y, halo_theta_E, x, y):
    """As `caustics_deflection`, for a number of subhaloes at a time that fits the cache."""
    chunks = zip(*(values.split(NUM_SUBHALOS_AT_ONCE) for values in (halo_x, halo_y, halo_theta_E)), strict=True)
    parts = [caustics_deflection(*chunk, x, y) for chunk in chunks]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def report(milliseconds: dict, contestants: dict, stages: dict, errors: dict[str, float], options) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    versions = {name: version(name) for name in ("lenstronomy", "caustics", "numba", "numpy", "torch")}
    print(f"{processor} ({render.processor()}), 1 thread, {options.repeats} x {options.images} images, paper-fixed")
    print(", ".join(f"{name} {number}" for name, number in versions.items()), end="\n\n")
    print(f"{'':12} {'by':19} {'images/s/core':>13} {'ms/image':>9} {'x lenstronomy':>14} {'max error/peak':>15}")
    rows = []
    for what, who in contestants:
        ms = milliseconds[what, who]
        speedup = milliseconds[what, "lenstronomy"] / ms
        error = f"{errors[who]:.1e}" if what == "light" and who != "raylens" else ""
        print(f"{what:12} {who:19} {1e3 / ms:13.1f} {ms:9.3f} {speedup:14.1f} {error:>15}")
        rows.append({"what": what, "by": who, "images_per_second": 1e3 / ms, "x_lenstronomy": speedup})
    split = {stage: round(milliseconds[stage], 4) for stage in stages}
    print("\none raylens image [ms]: " + ", ".join(f"{stage} {ms:.3f}" for stage, ms in split.items()), end="\n\n")
    facts = {"processor": processor, "cpu": render.processor(), "num_threads": 1, "versions": versions}
    print(json.dumps(facts | {"rows": rows, "milliseconds": split}))


if __name__ == "__main__":
    main()
