"""Wheel and source distribution: what is in them, that they install into an empty environment, and run there."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from images import ROOT

from raylens import __version__

pytestmark = pytest.mark.timeout(1800)  # where torch's build for CUDA comes over a slow network

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Declared, and imported by others in our name.
INDIRECT = {
    "s3fs": "fsspec opens s3:// with it",
    "tensorboard": "torch writes its files with it",
    "scikit-learn": "Optuna's importances",
    "boto3": "Ray's launcher on AWS",
}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """The folder with what `python -m build` makes of the tree, in an environment of its own."""
    folder = tmp_path_factory.mktemp("tree")
    # A copy, as setuptools takes over what an earlier build has left in a tree.
    shutil.copytree(ROOT / "raylens", folder / "raylens", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*"):
        if path.is_file():
            shutil.copy(path, folder)
    built = subprocess.run([sys.executable, "-m", "build", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return folder / "dist"


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def package_files() -> set[str]:
    """Return what belongs to the package: all of its folder."""
    files = [path for path in (ROOT / "raylens").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(ROOT)) for path in files}


# --- what is in them


def test_wheel_holds_the_package_and_nothing_else(distributions):
    """A page, a table or a card that is left out is missed when a run of hours ends; tests are nobody's package."""
    (wheel,) = distributions.glob("*.whl")
    info = f"raylens-{__version__}.dist-info"
    about = {f"{info}/{name}" for name in
             ("licenses/LICENSE", "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}  # fmt: skip

    assert wheel.name == f"raylens-{__version__}-py3-none-any.whl"
    assert contents(wheel).keys() == package_files() | about
    assert "raylens/py.typed" in package_files()


def test_source_distribution_holds_what_a_wheel_is_built_from(distributions):
    """And the versions that it is tested with; the tests need the repository, and half of them would be none."""
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}

    about = {"PKG-INFO", "LICENSE", "MANIFEST.in", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml"}
    made = {name for name in names if name.startswith("raylens.egg-info/")} | {"setup.cfg"}
    assert names == package_files() | about | made


def test_wheel_of_the_source_distribution_is_that_of_the_tree(distributions, image):
    """Who packages raylens anew ships what we do; the images' wheel is built from the tree."""
    (of_archive,) = distributions.glob("*.whl")
    (of_tree,) = (image.root / "dist").glob("*.whl")
    # RECORD holds checksums of WHEEL, and WHEEL the version of setuptools.
    compared = [
        {name: content for name, content in contents(wheel).items() if not re.search("/(RECORD|WHEEL)$", name)}
        for wheel in (of_archive, of_tree)
    ]

    assert compared[0] == compared[1]


def test_what_is_imported_is_declared_and_the_other_way_round():
    """What comes along with another package today does not tomorrow; what nobody uses is downloaded for nothing."""
    extras = PROJECT["optional-dependencies"]
    declared = {re.match(r"[\w-]+", line)[0] for line in (*PROJECT["dependencies"], *extras["aws"], *extras["onnx"])}
    modules: set[str] = set()
    for path in (ROOT / "raylens").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(str(node.module).partition(".")[0])
    modules -= {"raylens", "__future__", *sys.stdlib_module_names}

    known = packages_distributions()
    imported = {known[module][0].lower() for module in modules}
    assert imported - declared == set()
    assert declared - imported == INDIRECT.keys()
    assert extras.keys() == {"aws", "onnx", "dev"}


# --- where it is installed


def test_installed_alone_it_says_its_recipes_and_what_the_machine_can_do(image):
    """The first two commands of whoever has installed it; all that they need is in the wheel or declared."""
    recipes = image.run("raylens", "--quiet", "recipes")
    doctor = image.run("raylens", "--quiet", "doctor")

    assert "paper-varied" in json.loads(recipes.stdout)["recipes"]
    assert doctor.returncode == 0, doctor.stderr
    found = json.loads(doctor.stdout)
    assert all(one["fine"] for one in found.values())
    assert f"raylens {__version__}," in found["packages"]["detail"]
    where = image.run("python", "-c", "import raylens; print(raylens.__file__)").stdout
    assert where.startswith(image.moved("/opt/raylens/lib/"))


def test_without_the_extra_the_network_is_not_exported_and_the_extra_is_named(image):
    """An extra is fine to leave out if whoever needs it is told."""
    ran = image.run("python", "-c", "from raylens import onnx_model; onnx_model.encode(None, None)")

    assert "raylens[onnx]" in ran.stderr


def test_a_type_checker_outside_sees_its_types(image, tmp_path):
    """Without py.typed a checker takes all that is imported from raylens for anything."""
    script = tmp_path / "theirs.py"
    script.write_text("from raylens.simulate import simulate_block\n\nsimulate_block('smoke', range(8))\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", image.moved("/opt/raylens/bin/python"), script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert checked.stdout.splitlines()[-1] == "Found 1 error in 1 file (checked 1 source file)"
    assert 'incompatible type "str"; expected "Simulation"' in checked.stdout


# --- other Pythons


def interpreter(version: str) -> str | None:
    """Return a Python of a version, from PATH or from pyenv; pyenv's shims are there without one, and fail."""
    root = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *map(str, Path(root).glob(f"versions/{version}.*/bin/python"))]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in found:
        if path and subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip() == version:
            return path
    return None


@pytest.fixture
def elsewhere(request, tmp_path, distributions) -> Iterator[Path]:
    """An environment of another Python, into which the wheel is installed as docs/install.md says."""
    python = interpreter(request.param)
    if python is None:
        pytest.skip(f"no Python {request.param} on PATH or with pyenv")
    environment = tmp_path / "environment"
    subprocess.run([python, "-m", "venv", environment], check=True)
    (wheel,) = distributions.glob("*.whl")
    pip = [environment / "bin/python", "-m", "pip", "install", "--quiet"]
    try:
        subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", wheel], check=True)
        yield environment / "bin"
    finally:
        shutil.rmtree(environment)  # of 6 GB


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", ["3.12", "3.13"], indirect=True)
def test_it_installs_and_runs_on_other_pythons(elsewhere, cli, tmp_path):
    """The classifiers promise them; the pins must have wheels for them, and shards must not depend on them."""
    arguments = ("simulate", "smoke", "--num-images", "8", "--shard-size", "4", "--to")
    here = cli(*arguments, str(tmp_path / "here")).facts["dataset"]

    doctor = subprocess.run([elsewhere / "raylens", "--quiet", "doctor"], capture_output=True, text=True)
    ran = subprocess.run([elsewhere / "raylens", *arguments, tmp_path / "there"], capture_output=True, text=True)

    assert doctor.returncode == 0, doctor.stderr
    assert ran.returncode == 0, ran.stderr
    there = json.loads(ran.stdout.splitlines()[-1])["dataset"]
    shards = [sorted(Path(place).glob("*.parquet")) for place in (here, there)]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    assert len(shards[0]) == 2
