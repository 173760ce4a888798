"""`raylens simulate` for `ray job submit`, with the same arguments; submitted again, it does what is missing.

ray job submit --working-dir . -- python jobs/simulate.py paper-fixed --to s3://bucket/data --num-images 1000000
"""

import sys

from raylens.cli import run

if __name__ == "__main__":
    sys.argv[1:1] = ["simulate"]
    run()
