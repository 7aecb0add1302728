"""Stage 3, environment: what a run stands on.

device, precision and seed are chosen once and passed on as objects; `run` owns the run folder, its
lock and its metrics; `signals` turns SIGTERM and SIGINT into a flag that the loop reads between two
steps.
"""
