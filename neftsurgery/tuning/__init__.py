"""Training chosen neurons of a live torch model, or replacing them by those of a patch."""
