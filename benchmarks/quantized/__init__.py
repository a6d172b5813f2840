"""The suite on quantized checkpoints: diff of FP8 and MXFP4 pairs beside plain reads and torch."""
