"""Stage 2, model initialisation: spec -> transformer -> heads -> families -> weights -> load."""
