"""Checkpoint contents and atomic, checksummed checkpoint files."""
