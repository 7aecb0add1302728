"""Recorded runs: minutes to hours, started by hand, their figures kept in ftcore/RECORDS.md."""
