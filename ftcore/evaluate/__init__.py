"""Stage 5, evaluation: metrics -> evaluator -> report."""
