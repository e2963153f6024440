"""SQL replies, judged in a sandbox."""
