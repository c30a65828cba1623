"""`python -m widekernel`: the command line."""

import sys

from widekernel.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
