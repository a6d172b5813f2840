"""Fuzzing of everything that reads a stranger's file; see `__main__`."""
