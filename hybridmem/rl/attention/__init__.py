"""Attention as the policy: records, distributions and exploration."""
