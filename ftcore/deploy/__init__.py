"""Stage 6, deployment: the inference engine, and the HTTP server over it."""
