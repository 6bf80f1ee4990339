"""The doors: routes, schemas, errors."""
