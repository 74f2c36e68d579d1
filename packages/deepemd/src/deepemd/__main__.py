"""``python -m deepemd`` is the command line."""

import sys

from deepemd.cli import main

sys.exit(main())
