"""The paper's analysis of a fine-tune: how each neuron's use of the hidden states moved in the ranking."""
