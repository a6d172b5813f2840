"""What the machine allows. Each limit is a script that runs in its own process."""
