"""The Hugging Face model; flat, because an exported folder carries these files."""
