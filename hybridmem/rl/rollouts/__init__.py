"""Sampling of responses, and the data that training takes from them."""
