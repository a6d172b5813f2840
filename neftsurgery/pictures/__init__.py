"""Pictures: where a fine-tune changed a model, which neurons a budget chooses, and how sure that is."""
