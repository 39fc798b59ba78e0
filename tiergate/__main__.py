"""`python -m tiergate`."""

import sys

from tiergate.cli import main

if __name__ == "__main__":
    sys.exit(main())
