"""What people use instead. Each rival is a script that does what a user would do, in its own process.

Each prints ``{"seconds": ...}``: the time of its work without its imports. Those that write end with fsync,
as ``apply`` does, so that all are timed for the same durability.
"""
