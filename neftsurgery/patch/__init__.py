"""The patch: as a value, as a file, and over another patch."""
