"""Where bytes come from: local paths, or a Hub id resolved to local files."""
