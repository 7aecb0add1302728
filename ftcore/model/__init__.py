"""Stage 2, model initialisation: one transformer for encoders and decoders, read from safetensors.

spec -> transformer -> heads -> families -> weights -> load; cache and generate for sampling.
"""
