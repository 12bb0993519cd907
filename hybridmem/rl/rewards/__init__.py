"""Reward functions, retrievers and critics."""
