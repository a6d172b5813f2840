"""Chosen neurons in PEFT's own comparison of methods: MetaMathQA and GSM8K, Llama-3.2-3B.

``python -m benchmarks peft-comparison --help``. It puts experiments into a checkout of PEFT and runs the code
of that checkout, unchanged.
"""
