"""What a neuron is: which tensors hold neurons, along which axes, and which form a unit."""
