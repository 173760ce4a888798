"""`raylens reproduce` for `ray job submit`, with the same arguments; submitted again, it does what is missing.

ray job submit --working-dir . -- python jobs/reproduce.py paper-fixed paper-varied --to s3://bucket/paper
"""

import sys

from raylens.cli import run

if __name__ == "__main__":
    sys.argv[1:1] = ["reproduce"]
    run()
