"""Judges: what scores samples, or prefers one of two. Each kind has a file; `build` makes one from a text."""
