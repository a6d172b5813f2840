"""The tools every suite measures with. Standard library only."""
