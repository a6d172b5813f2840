"""Does choosing sensitive neurons help, or only the freezing? The NeFT paper's main table in miniature.

``python -m benchmarks selection --help``. A small Llama learns English and Chinese text and translation from
Chinese into English; then it is tuned to translate English into Chinese, in every way there is to choose
what is trained, each with a learning rate of its own found by the same rule. Finished runs are lines of a
file: a run of the suite that was stopped goes on where it was.
"""
