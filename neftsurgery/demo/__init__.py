"""The checkpoints, languages and models that `neftsurgery demo` generates."""
