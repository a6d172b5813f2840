"""Where bytes come from: local paths, and Hub ids resolved to local files."""
