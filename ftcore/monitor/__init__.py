"""Stage 7, monitoring: journal -> drift -> retrain."""
