"""`python -m sdxl_lab`: the command line of `cli.py`, and nothing of its own."""

import sys

from .cli import main

sys.exit(main())
