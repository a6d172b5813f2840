"""The coding of differences between two tensors: blocks of elements in, bytes out, and back, to the bit."""
