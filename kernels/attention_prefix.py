"""What sequences that have ended leave behind, for prompts that begin like them."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import takewhile
import torch
from torch import Tensor
from kernels.attention_cache import Cache

BLOCK = 16  # tokens

class Prefixes:
    """Keys and values of at most `most` tokens, in blocks, which are found by all ids up to their
    end and by an owner, who alone finds them. Least recently used leave first; of a sequence, its
    end does."""

    def __init__(self, most: int) -> None:
        self.most = most // BLOCK  # blocks
        self.blocks = OrderedDict[bytes, Tensor]()  # L2GSD, L layers; least recently used first

    def keep(self, owner: object, ids: Sequence[int], cache: Cache, row: int) -> None:
        """All that the cache has of a sequence, which is these tokens."""
        for place, key in reversed([*zip(range(self.most), _keys(owner, ids), strict=False)]):
            if key not in self.blocks:
                start = place * BLOCK
                self.blocks[key] = torch.stack([tokens_2GSD[:, :, start : start + BLOCK]
                                                for tokens_2GSD in cache.read(row, len(ids))])
            self.blocks.move_to_end(key)
            if len(self.blocks) > self.most:
                self.blocks.popitem(last=False)

    def find(self, owner: object, ids: Sequence[int]) -> tuple[Tensor, ...]:
        """2GSD of each layer of the longest known beginning of a prompt, but for its last token."""
        keys = takewhile(self.blocks.__contains__, _keys(owner, ids[:-1]))
        blocks = [self.blocks[key] for key in keys]
        return torch.stack(blocks, 3).flatten(3, 4).unbind() if blocks else ()

def _keys(owner: object, ids: Sequence[int]) -> Iterator[bytes]:
    """Of every whole block."""
    key = repr(owner).encode()
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        key = sha256(key + array("q", ids[end - BLOCK : end])).digest()
        yield key
