"""What people use instead: every rival is a script that does what a user would, in its own process.

Each prints ``{"seconds": ...}``: its work without its imports. Those that write end with fsync of what they
wrote, as ``apply`` does: else they would be timed for a promise they did not keep.
"""
