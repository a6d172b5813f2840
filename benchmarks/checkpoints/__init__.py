"""Makes the checkpoints that are measured: ``python -m benchmarks.checkpoints --help``."""
