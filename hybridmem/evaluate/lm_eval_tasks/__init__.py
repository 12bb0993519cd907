"""The tasks of `hybridmem eval` for lm-eval: give this folder as --include_path."""
