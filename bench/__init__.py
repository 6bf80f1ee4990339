"""Benchmarks: see README.md."""

import sdxl_lab  # noqa: F401  prepares the environment before torch is imported
