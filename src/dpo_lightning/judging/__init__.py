"""Is a reply any good? Judges, their shares, and how replies are shown."""
