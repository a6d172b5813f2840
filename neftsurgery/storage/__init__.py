"""Atomic output, copies, threads, the page cache: nothing here knows what a tensor is."""
