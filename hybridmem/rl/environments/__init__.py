"""Environments for multi-turn rollouts."""
