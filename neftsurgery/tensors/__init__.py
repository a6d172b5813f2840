"""The safetensors format: element types, headers, positioned reads, all-or-nothing writes, JSON documents."""
