"""Patches that people share: the model card, push and pull."""
