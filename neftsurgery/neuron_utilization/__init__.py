"""How a fine-tune changes the correlation of neurons with hidden states: section 6.1 of the NeFT paper."""
