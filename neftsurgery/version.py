"""The version, kept apart so that anything can name it without loading anything."""

__version__ = "0.1.0"
