"""Numbers about images, and what they prove."""
