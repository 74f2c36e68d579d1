"""`python -m lookahead_minmax` is the command line."""

import sys

from lookahead_minmax.cli import main

sys.exit(main())
