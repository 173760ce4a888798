"""`raylens tune` for `ray job submit`, with the same arguments; submitted again, it does what is missing.

ray job submit --working-dir . -- python jobs/tune.py paper-n-cnn --data s3://bucket/data/DATASET --to s3://bucket/campaigns/n-cnn
"""

import sys

from raylens.cli import run

if __name__ == "__main__":
    sys.argv[1:1] = ["tune", "--resume"]
    run()
