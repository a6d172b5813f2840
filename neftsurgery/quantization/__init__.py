"""Quantized weights: which tensors are codes and which their scales, and the numbers that they stand for."""
