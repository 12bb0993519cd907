"""Evaluation of causal LMs on long contexts."""
