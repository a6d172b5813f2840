"""What `neftsurgery demo` shows."""
