"""`python -m composefit`: the command line."""

import sys

from composefit.cli import main

if __name__ == "__main__":
    sys.exit(main())
