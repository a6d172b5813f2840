"""What `neftsurgery demo` works on, made on the spot: checkpoints, languages, a model that learns them."""
