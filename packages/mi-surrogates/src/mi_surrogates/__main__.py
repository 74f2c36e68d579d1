"""`python -m mi_surrogates` is the command `mi-surrogates`."""

import sys

from mi_surrogates.cli import main

sys.exit(main())
