"""Stage 5, evaluation: metrics -> text -> evaluator -> report."""
