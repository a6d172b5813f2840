"""The report: its figures and its HTML page."""
