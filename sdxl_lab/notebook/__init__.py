"""The explore panel, and notebooks run without hands."""
