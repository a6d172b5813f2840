"""One module per command, each loaded when it is called."""
