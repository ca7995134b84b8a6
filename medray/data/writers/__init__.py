"""Answers as files, each in the geometry of its input: one format a file."""
