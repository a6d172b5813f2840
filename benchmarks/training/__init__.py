"""The suite for training: what a step costs, in time and memory, beside the floor and the rivals.

``python -m benchmarks training --help``. Every contestant is a worker process of its own, with a model of
the same shape and the same batch; the workers live side by side and step in turns, so that drift hits all
alike.
"""
