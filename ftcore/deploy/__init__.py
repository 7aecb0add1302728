"""Stage 6, deployment: engine."""
