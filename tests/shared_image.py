"""The image, made once for all tests that ask for it by `pytest_plugins = "shared_image"`."""

import subprocess
from collections.abc import Iterator

import images
import pytest


@pytest.fixture(scope="session")
def image(tmp_path_factory) -> Iterator[images.Image]:
    """What the stage `node` is, from which the two images that are shipped differ by a check; it takes a minute."""
    root = tmp_path_factory.mktemp("image")
    yield images.make(root, "node")
    subprocess.run(["chmod", "-R", "u+w", root], check=True)
    subprocess.run(["rm", "-rf", root], check=True)  # gigabytes, where pytest keeps the folders of three sessions
