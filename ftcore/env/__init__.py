"""Stage 3, environment: what a run stands on: device, precision, seeds, plan, run."""
