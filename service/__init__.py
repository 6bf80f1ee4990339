"""The service: a promoted configuration, behind HTTP."""
