"""SDXL Lab: what a researcher tuned is, provably, what the product serves."""

from sdxl_lab.environment import prepare

__version__ = "0.1.0"

prepare()
