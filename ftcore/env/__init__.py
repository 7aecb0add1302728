"""Stage 3, environment: what a run stands on.

device and seed are chosen once and passed on; `run` owns the run folder; `signals` turns SIGTERM
and SIGINT into a flag that the loop reads between two steps.
"""
