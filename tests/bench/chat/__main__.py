"""`python -m tests.bench.chat` writes the rows of the built-in chat data set into the package."""

from ftcore.builtin.chat import FOLDER
from ftcore.files import write_file

from .rows import packed

for split, content in packed().items():
    write_file(FOLDER / f"{split}.jsonl.gz", content)
    print(f"{FOLDER / split}.jsonl.gz: {len(content)} bytes")
