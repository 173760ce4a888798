"""Reads a Dockerfile, and does in a folder what it says of Python: where no engine runs, an image can still be tried.

The folder stands for the root of every stage, as no two of them write the same place differently. What is about the
system and its users (apt-get, useradd) is left out; instead everything is read-only but the user's home.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
IGNORED = ROOT / ".dockerignore"

_OF_THE_SYSTEM = ("apt-get", "useradd")
_PLACES = re.compile(r"(?<![\w.$/-])/(?=(?:opt|build|dist|home)\b)")  # absolute, and not within another path


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile, continued lines joined."""

    keyword: str
    flags: dict[str, str]
    text: str

    @property
    def pairs(self) -> dict[str, str]:
        """The NAME=value of ENV, LABEL and ARG."""
        return dict(word.partition("=")[::2] for word in shlex.split(self.text))


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def stages(text: str) -> dict[str, Stage]:
    """Return the stages of a Dockerfile by their names."""
    found: dict[str, Stage] = {}
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        keyword, _, rest = line.partition(" ")
        flags = {}
        while match := re.match(r"\s*--([\w-]+)=(\S+)\s+", rest):
            flags[match[1]], rest = match[2], rest[match.end() :]
        if keyword == "FROM":
            base, _, name = rest.split()
            found[name] = Stage(name, base)
        elif keyword:
            [*found.values()][-1].instructions.append(Instruction(keyword, flags, rest.strip()))
    return found


def lineage(known: dict[str, Stage], name: str) -> list[Instruction]:
    """Return all instructions that make a stage, from its base on."""
    above = lineage(known, known[name].base) if known[name].base in known else []
    return above + known[name].instructions


def is_ignored(path: str, patterns: str) -> bool:
    """Tell whether a .dockerignore keeps a path out: the last line that matches it, or a folder above it, decides."""
    ignored = False
    lines = [line for line in patterns.splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        pattern = re.escape(line.removeprefix("!").rstrip("/"))
        pattern = pattern.replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, str(one)) for one in (path, *PurePosixPath(path).parents)):
            ignored = not line.startswith("!")
    return ignored


def sources(source: str) -> list[str]:
    """Return the files that COPY takes of a source, by their paths in the repository."""
    place = ROOT / source
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    paths = [str(path.relative_to(ROOT)) for path in files if path.exists()]
    return [path for path in paths if not is_ignored(path, IGNORED.read_text())]


@dataclass(frozen=True)
class Image:
    """What the steps of a Dockerfile left in a folder, and the environment in which its commands run."""

    root: Path
    environment: dict[str, str]

    def moved(self, text: str) -> str:
        """Return a text with the image's places in the folder."""
        return _PLACES.sub(f"{self.root}/", text)

    def run(self, *command: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
        """Run a command as the image's user: in its home, and with write access to nothing else in the image."""
        # Who is root may write everywhere, unless this is taken away.
        confined = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
        return subprocess.run(
            [*confined, *command],
            cwd=self.root / "home/ray",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


def make(root: Path, target: str) -> Image:
    """Do what the stages up to one say, in the order of the file."""
    known = stages(DOCKERFILE.read_text())
    subprocess.run([sys._base_executable, "-m", "venv", root / "usr/local"], check=True)  # type: ignore[attr-defined]
    for name in list(known)[: list(known).index(target) + 1]:
        image = Image(root, _surroundings(root))
        folder = root
        for step in known[name].instructions:
            folder = _do(image, step, folder)
    subprocess.run(["chmod", "-R", "a-w", root / "opt"], check=True)
    return image


def _surroundings(root: Path) -> dict[str, str]:
    """Return the environment in which a stage begins: the proxies and settings of pip from here, and no compiler."""
    ours = ("AWS_", "PYTHON", "RAY_", "VIRTUAL_ENV")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    resources = {"RAY_OVERRIDE_RESOURCES": os.environ.get("RAY_OVERRIDE_RESOURCES", "{}")}
    return inherited | resources | {"PATH": f"{root}/usr/local/bin:/usr/bin:/bin", "CC": "false", "CXX": "false"}


def _do(image: Image, step: Instruction, folder: Path) -> Path:
    """Do one instruction in a folder, and return where the next one is done."""
    if step.keyword == "WORKDIR":
        folder = Path(image.moved(step.text))
        folder.mkdir(parents=True, exist_ok=True)
    elif step.keyword in ("ENV", "ARG"):
        for name, value in step.pairs.items():
            image.environment[name] = image.moved(value).replace("$PATH", image.environment["PATH"])
    elif step.keyword == "COPY":
        *what, where = step.text.split()
        if "from" in step.flags:
            assert what == [where], "stages share one folder here, so that a place must be called the same in both"
            return folder
        for source in what:
            for path in sources(source):
                under = Path(path).relative_to(source if (ROOT / source).is_dir() else Path(source).parent)
                target = folder / image.moved(where) / under
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / path, target)
    elif step.keyword == "RUN" and not any(word in step.text for word in _OF_THE_SYSTEM):
        done = subprocess.run(
            ["sh", "-c", image.moved(step.text)], cwd=folder, env=image.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{step.text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return folder
