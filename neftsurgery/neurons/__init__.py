"""Which slices of which tensors are neurons, and how their vectors are read and written."""
