"""Execution of untrusted programs."""
