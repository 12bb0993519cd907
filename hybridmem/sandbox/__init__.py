"""Sandboxed execution of untrusted programs."""
