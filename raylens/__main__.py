"""`python -m raylens` is `raylens`."""

import sys

from raylens.cli import main

sys.exit(main())
