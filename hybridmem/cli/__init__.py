"""Command line: `main`, and a file for each of hybridmem's own commands."""
