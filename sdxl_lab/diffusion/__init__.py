"""Models, schedulers and the engine: from a request to pixels."""
