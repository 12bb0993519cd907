"""Rollouts: sampled responses, and the experience that objectives learn from."""
