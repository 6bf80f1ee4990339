"""Sweeps, studies, their cache and their plots."""
