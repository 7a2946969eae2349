"""`python -m moesaic.cli`, the same as `moesaic`."""

import sys

from . import main

sys.exit(main())
