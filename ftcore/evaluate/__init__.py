"""Stage 5, evaluation: streaming metrics, their uncertainty, and tables for people.

metrics -> text -> significance -> evaluator -> report.
"""
