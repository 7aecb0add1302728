"""Stage 6, deployment: jobs -> engine."""
