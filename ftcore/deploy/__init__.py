"""Stage 6, deployment: a run as a folder to give away, the inference engine, the HTTP server."""
