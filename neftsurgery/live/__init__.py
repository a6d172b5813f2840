"""Models in memory: loading them, the names of their weights, and the vectors of neurons in these weights."""
