"""PolicyModule for reinforcement learning, and its parts."""
