"""Safetensors files and checkpoints: headers, positioned reads and writes, all-or-nothing outputs."""
