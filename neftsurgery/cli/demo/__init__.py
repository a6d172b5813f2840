"""The two demos of `neftsurgery demo`: one on files, one with training."""
