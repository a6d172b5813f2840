"""Makes pages and charts from stored results. Measures nothing."""
