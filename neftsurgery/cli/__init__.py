"""The command line: the only place that knows click, progress bars and exit codes."""
