"""What every suite measures with; nothing but the standard library."""
