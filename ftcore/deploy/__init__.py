"""Stage 6, deployment: a run made into a folder that can be given away, tried and served."""
