"""Environments that a policy acts in over many turns."""
