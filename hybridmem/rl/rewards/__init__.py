"""Reward functions and the services that they call."""
