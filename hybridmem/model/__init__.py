"""The Hugging Face model. The package is flat because an exported folder carries these files."""
