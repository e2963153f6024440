"""Judges of replies, the means of their verdicts and the words for them, and tables of replies."""
