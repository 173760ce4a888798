"""`python -m raylens` is `raylens`."""

from raylens.cli import run

run()
