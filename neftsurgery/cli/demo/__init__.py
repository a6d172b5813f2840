"""The rounds that `neftsurgery demo` shows."""
