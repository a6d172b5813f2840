"""All that needs a GPU, in one command: the tests marked for CUDA, the training suite, the switch suite.

``python -m benchmarks gpu --help``, or ``make gpu``. It uses no network.
"""
