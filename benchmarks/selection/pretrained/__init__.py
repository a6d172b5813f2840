"""The same question on two published models: ``python -m benchmarks selection --model minilm``.

An encoder learns to classify sentences, a chat model to solve grade-school problems. Every arm starts from
the same model, with a head that was fitted on the frozen features, and trains as many parameters; each has a
learning rate of its own, found by the ladder. Every finished run is a line of a file, so a stopped suite
resumes where it was.
"""
