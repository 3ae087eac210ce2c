"""`python -m fastattn` is `fastattn`."""

import sys

from fastattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
