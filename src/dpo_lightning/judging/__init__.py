"""Is a reply any good? Judges, the means of their verdicts and what they are called, and how replies are shown."""
