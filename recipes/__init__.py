"""What trains the models that this tree ships."""

import sdxl_lab  # noqa: F401  prepares the environment before torch is imported
