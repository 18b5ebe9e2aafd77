"""``python -m energon_fn`` is the console script ``energon-fn``."""

import sys

from energon_fn.cli import main

if __name__ == "__main__":
    sys.exit(main())
