"""The process and what stands before the routes."""
