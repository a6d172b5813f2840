"""Does choosing sensitive neurons help, or only the freezing? The NeFT paper's main table in miniature.

``python -m benchmarks selection --help``. A small Llama is pre-trained on English and Chinese text and on
translation from Chinese into English. Then it is fine-tuned to translate English into Chinese. The arms
differ in what is trained; each has its own learning rate, found by the same rule. Every finished run is a
line of a file, so a stopped suite resumes where it was.
"""
