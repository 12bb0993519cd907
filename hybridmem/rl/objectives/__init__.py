"""Training objectives, each a dataclass with hooks."""
