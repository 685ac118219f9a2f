"""``python -m cl_bench`` is ``cl-bench``."""

import sys

from cl_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
