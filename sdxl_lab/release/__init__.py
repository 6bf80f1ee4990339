"""From a tuned configuration to a promoted slot, and back."""
