"""Stage 3, environment: what a run stands on: device, precision, seeds, processes, plan, run."""
