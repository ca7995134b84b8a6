"""The champion made ready: write, open, verify and use a bundle."""
