"""Runs of train.py on tiny models, as tests/commands has them."""

from tests.commands.conftest import _apart, bert, classify, files, qwen3, run, sft  # noqa: F401
