"""The suite for training: what a step costs, in time and memory, beside the floor and the rivals.

``python -m benchmarks training --help``. Each contestant is its own worker process, with a model of the same
shape and the same batch. The workers run side by side and step in turns, so that drift affects all alike.
"""
