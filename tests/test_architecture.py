"""Who may import whom, read from the sources: the order of the modules, the wall, and where Ray may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import raylens

PACKAGE = Path(raylens.__file__).parent

# A module imports only what stands before it.
ORDER = [
    "config", "image", "storage", "recipes", "search", "campaign",
    "physics.cosmology", "physics.lenses", "physics.subhalos", "physics.render", "physics.reference",
    "simulate", "shards", "dataset", "export", "card", "illustrate", "cluster", "generate",
    "baselines", "models", "metrics", "learning", "share", "checkpoint", "board", "train", "trial", "figures", "page",
    "findings", "tune", "onnx_model", "intake", "predict", "evaluate", "paper", "report", "reproduce", "doctor",
    "cli", "__main__",
]  # fmt: skip

# The sky, of which the network must learn from images alone.
SKY = ("physics", "simulate", "card", "illustrate", "generate")
BELOW_THE_WALL = ORDER[ORDER.index("baselines") : ORDER.index("reproduce")]

WITH_RAY = {"cluster", "generate", "train", "tune", "predict"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


# `__init__` holds a version and a docstring, and is imported before all.
MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def imports(source: str, package: str) -> set[str]:
    """Return the full names of what a module imports, also inside functions; `package` is where it lies."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """Return the modules of raylens that a module imports."""
    package = ".".join(["raylens", *module.split(".")[:-1]])
    own = set()
    for name in imports(MODULES[module].read_text(), package):
        if name.startswith("raylens."):
            # What is imported is a module, or something in one.
            inside = name.removeprefix("raylens.")
            own |= {known for known in MODULES if inside == known or inside.startswith(f"{known}.")}
    return own


def test_imports_are_found_wherever_they_stand():
    """A check that sees nothing passes always."""
    source = """
import ray.data
from raylens import storage, cluster as c
from raylens.physics.lenses import mass
from . import dataset
def late():
    from .physics import render
"""
    assert imports(source, "raylens") == {
        "ray.data", "raylens.storage", "raylens.cluster", "raylens.physics.lenses.mass", "raylens.dataset",
        "raylens.physics.render",
    }  # fmt: skip
    assert own_imports("generate") >= {"cluster", "dataset", "simulate", "physics.render", "config"}


def test_each_module_has_its_place_in_the_order():
    """A new module has to be put somewhere, or the rules below would not know of it."""
    assert set(MODULES) <= set(ORDER)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_stands_before_it(module):
    """So that one can read the package from the front, and no circle can close."""
    later = set(ORDER[ORDER.index(module) :])

    assert own_imports(module) & later == set()


@pytest.mark.parametrize("module", sorted(set(BELOW_THE_WALL) & set(MODULES)))
def test_nothing_below_the_wall_imports_the_sky(module):
    """What trains and measures knows of a lens only what a dataset tells, so that no true parameter leaks in."""
    assert {name for name in own_imports(module) if name.split(".")[0] in SKY} == set()


def test_dataset_imports_nothing_of_the_sky():
    """It is the gate in the wall: both sides import it, so it must carry nothing across."""
    assert {name for name in own_imports("dataset") if name.split(".")[0] in SKY} == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) - WITH_RAY))
def test_ray_is_imported_only_where_one_becomes_many(module):
    """Also not inside functions: the rest must run on a machine without Ray."""
    everything = imports(MODULES[module].read_text(), "raylens")

    assert {name for name in everything if name.split(".")[0] == "ray"} == set()


def test_the_one_works_on_a_machine_without_ray():
    """A lone GPU box simulates, learns and measures without it; here Ray cannot be imported."""
    script = """
import sys
sys.modules["ray"] = None  # every import of it fails from here on
import torch
from raylens import config, dataset, learning, metrics, models, shards, simulate, storage

simulation = config.Simulation().override({"camera.num_pixels": 8, "subhalos.mass_min": 5e9})
rows = simulate.simulate_block(simulation, range(4))
image_BHW = torch.from_numpy(shards.images(shards.to_table(rows, simulation)).copy())
scaling = models.Scaling(offset=0.0, scale=1.0)
network = models.CNN(
    "n-cnn", config.Model(filters=(4,), kernel_size=3, dense=8), num_pixels=8, target=scaling, num_subhalos=scaling
)
num_subhalos_B = torch.from_numpy(rows["num_subhalos"]).float()
print(len(learning.predict(network, image_BHW, num_subhalos_B)), any(name.startswith("ray.") for name in sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)

    assert (ran.stdout, ran.returncode) == ("4 False\n", 0), ran.stderr


def test_the_command_line_answers_without_ray_and_torch():
    """`raylens --help` and a mistyped word should not wait seconds for what they do not need."""
    script = """
import sys
sys.modules["ray"] = sys.modules["torch"] = None
from raylens.cli import main
sys.exit(main(["show", "smoke"]) or main(["recipes"]) or main(["--help"]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)

    assert ran.returncode == 0, ran.stderr
    assert "simulate" in ran.stdout
