"""What the machine allows: every limit is a script, run as a process of its own."""
