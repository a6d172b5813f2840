"""How a fine-tune moved each neuron in a ranking: its correlation with hidden states (NeFT, section 5)."""
