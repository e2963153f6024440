"""Judges SQL replies in a sandbox."""
