"""Preference and RL: what answers are worth, and training by it."""
