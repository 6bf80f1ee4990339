"""`python -m sdxl_lab`: the command line of `cli.py`, and nothing of its own."""

import sys

from sdxl_lab.cli import main

sys.exit(main())
