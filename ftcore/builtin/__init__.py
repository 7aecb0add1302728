"""The embedded default: a tiny pre-trained base model and a chat data set (made in tests/bench)."""
