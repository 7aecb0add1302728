"""Stage 3, environment: what a run stands on: device, seed, plan, run, signals."""
