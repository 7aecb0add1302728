"""Stage 2, model initialisation: transformer -> heads -> families -> load -> generate."""
