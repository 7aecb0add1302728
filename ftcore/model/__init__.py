"""Stage 2, model initialisation: spec -> transformer -> heads -> families -> load -> generate."""
