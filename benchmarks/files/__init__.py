"""The suite for commands on files: diff, extract, apply, in place."""
