"""Checkpoints: files, tied tensors, provenance, adapters on them, changes in place that can be undone."""
