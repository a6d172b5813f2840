"""Fuzzes every reader of untrusted files; see `__main__`."""
