"""The version, and how to install it, kept apart so that anything can name them without loading anything."""

__version__ = "0.1.0"

UPDATE = "update neftsurgery: in a clone of it, git pull and pip install -U ."


def install_command(extra: str) -> str:
    """How to install an extra, for messages: from the source, as the package is on no index yet."""
    return f"in a clone of neftsurgery: pip install '.[{extra}]'"
