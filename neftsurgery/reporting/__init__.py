"""The report: figures, and the HTML page they stand on."""
