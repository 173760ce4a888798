"""What `raylens simulate` says before it begins (--dry-run) and while it runs."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from raylens.config import Experiment, Simulation


def write_recipe(path: Path, simulation: Simulation) -> str:
    path.write_text(json.dumps(Experiment(name="tiny", simulation=simulation).as_dict()))
    return str(path)


def test_a_dry_run_foresees_the_bytes(main, tiny, tmp_path, ray_cluster):
    """Whoever pays for storage wants to know before."""
    words = ("simulate", write_recipe(tmp_path / "tiny.json", tiny), "--to", str(tmp_path), "--num-images", "3000")

    foreseen = main(*words, "--dry-run").facts["bytes"]

    made = sum(path.stat().st_size for path in Path(main(*words).facts["dataset"]).glob("*.parquet"))
    assert 0.8 * made < foreseen < 1.25 * made


def test_a_dry_run_measures_what_an_image_costs(main, tiny, tmp_path):
    """lenstronomy takes many times as long as the kernel, and more images take longer."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny)

    def cpu_hours(*words: str) -> float:
        return main("simulate", recipe, "--to", str(tmp_path), "--dry-run", *words).facts["cpu_hours"]

    fast = cpu_hours("--num-images", "10000")
    assert 0 < 3 * fast < cpu_hours("--num-images", "10000", "--set", "engine=lenstronomy")
    assert 10 * fast < cpu_hours("--num-images", "1000000")


def test_a_dry_run_says_where(main, tiny, tmp_path, monkeypatch):
    """A night on the wrong cluster is dear."""
    words = ("simulate", write_recipe(tmp_path / "tiny.json", tiny), "--to", str(tmp_path), "--dry-run")

    assert "of this machine" in main(*words).stdout
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert "on the Ray cluster at 10.1.2.3:6379" in main(*words).stdout


def test_a_dry_run_refuses_what_the_run_would_refuse(main, tiny, make_dataset, tmp_path):
    """Another shard size than the one that stands."""
    make_dataset(tmp_path, tiny)
    recipe = write_recipe(tmp_path / "tiny.json", tiny)

    ran = main("simulate", recipe, "--to", str(tmp_path), "--shard-size", "5", "--dry-run")

    assert ran.returncode == 1
    assert "has shards of 4 images; got --shard-size 5" in ran.stderr


@pytest.mark.parametrize(
    ("to", "changes", "reason"),
    [("/proc/nowhere", {}, "cannot be written"), ("{tmp}", {"subhalos.mass_min": 1.0}, "subhaloes")],
)
def test_a_dry_run_foresees_nothing_where_the_run_would_not_begin(main, tiny, tmp_path, to, changes, reason):
    """A place that cannot be written, and more subhaloes than can be drawn."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny.override(changes))

    ran = main("simulate", recipe, "--to", to.format(tmp=tmp_path), "--dry-run")

    assert ran.returncode == 1
    assert reason in ran.errors[0]


def test_on_a_terminal_progress_is_one_line_that_changes(tiny, tmp_path):
    """In a log lines follow each other (tests/test_cli.py); a terminal of a thousand lines tells nobody anything."""
    recipe = write_recipe(tmp_path / "tiny.json", tiny)
    command = [
        sys.executable, "-m", "raylens", "simulate", recipe, "--to", str(tmp_path), "--num-images", "64",
        "--shard-size", "4",
    ]  # fmt: skip
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs) as run:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 4096):
                shown += part
        except OSError:
            pass  # the other end is closed
    os.close(ours)

    assert run.returncode == 0
    progress, _, after = shown.decode().partition("\r\n")
    assert "images" not in after
    lines = progress.split("\r\x1b[K")
    assert re.search(r"64 of 64 images  16 of 16 shards +[\d,.]+/s  in \d+ s$", lines[-1])
    assert re.search(r"\d+ of 16 shards +[\d,.]+/s  (\d+ min )?\d+ s left$", lines[1])
