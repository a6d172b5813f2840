"""Writes the checkpoints that benchmarks read: ``python -m benchmarks.checkpoints --help``."""
