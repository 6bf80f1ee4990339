"""The version of library and service: in every image's record, in /config, and what the package is built as."""

__version__ = "0.1.0"
