"""`sgld` and `python -m sgld`."""

import sys

from sgld.cli import main

if __name__ == "__main__":
    sys.exit(main())
