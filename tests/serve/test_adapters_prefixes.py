"""Known prompts are known to the adapter that read them alone."""

from collections.abc import Callable
from pathlib import Path
from tests.serve.conftest import Client
from tests.serve.test_adapters import NAMES, TURNS, adapted, says

__all__ = ["adapted", "says"]  # fixtures

def test_an_adapter_finds_what_it_has_read_itself(
    adapted: Client, tmp_path: Path, says: Callable
) -> None:
    folders = [None, tmp_path / "adapter-0", tmp_path / "adapter-1"]
    for is_known in (False, True):
        for name, folder in zip(NAMES, folders, strict=True):
            told = adapted.chat(TURNS[0]["content"], model=name, max_tokens=40).json
            assert told["choices"][0]["message"]["content"] == says(folder, 40)
            assert (told["usage"]["prompt_tokens_details"]["cached_tokens"] > 0) == is_known
