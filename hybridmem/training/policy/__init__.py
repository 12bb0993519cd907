"""Reinforcement learning as a Lightning module."""
