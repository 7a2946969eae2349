"""`python -m moesaic`, the same as `moesaic`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
