"""The suite for switching between patches of a live model, beside plain copies of the same rows.

``python -m benchmarks switch --help``. One process: the contestants change the same weights in turns.
"""
