"""Errors that a user can cause: each message says what is wrong, where, and how to mend it. The
scripts print it alone, without a traceback; `assert` is kept for our own invariants."""

from collections.abc import Sequence
from difflib import get_close_matches

class FtcoreError(ValueError):
    """Base of every error caused by input: a value, a constraint, a remedy."""

class ConfigError(FtcoreError):
    """An option is unknown, mistyped or contradicts another."""

class DataError(FtcoreError):
    """A data file cannot be read as asked, or holds rows that cannot be used."""

class ModelError(FtcoreError):
    """A model folder is incomplete, damaged or of an unknown family."""

class CheckpointError(FtcoreError):
    """A checkpoint cannot be written, or none of those found can be trusted."""

class TrainingError(FtcoreError):
    """A run cannot go on: its steps are not applied."""

def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: which one was probably meant, if any."""
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: {near[0]!r}" if near else ""
