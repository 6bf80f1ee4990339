"""SDXL Lab: what a researcher tuned is, provably, what the product serves."""

import os

__version__ = "0.1.0"

# transformers warns at import that torchvision is missing; nothing here uses it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
