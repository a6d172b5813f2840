"""How small a whole fine-tune gets, and how fast, beside general compressors and the entropy."""
