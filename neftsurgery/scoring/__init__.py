"""How far a neuron moved: kernels, sums, scores, and the engine that streams weights past them."""
