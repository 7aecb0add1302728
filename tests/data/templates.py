"""Chat templates in eight styles, from templates.toml, and tokenizers of two kinds."""

import json
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers
from ftcore.data.tokenizer import Tokenizer

BASE = Path(__file__).parents[2] / "ftcore" / "builtin" / "base"
MERGES = ("\u2581 t", "h e", "\u2581t he", "\u2581 \u2581", "o u", "f ou", "fou r", "\u2581 four")
TURNS = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "And in h\u00e9x \U0001f642?"},
    {"role": "assistant", "content": "Still four \U0001f642\n\nin h\u00e9x."},
)

@dataclass(frozen=True)
class Style:
    """One template and its tokens; the fields are explained in templates.toml."""

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    bos: str | None = None
    greedy: tuple[str, ...] = ()
    lead: str = ""
    tail: str = ""
    trims: bool = False
    system: str = "own"

@cache
def styles() -> dict[str, Style]:
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    return {name: Style(**table) for name, table in tables.items()}

def finished(fast: tokenizers.Tokenizer, template: str | None, **named: str | None) -> Tokenizer:
    config = {name: token for name, token in named.items() if token is not None}
    files = {
        "tokenizer.json": fast.to_str().encode(),
        "tokenizer_config.json": json.dumps({**config, "chat_template": template}).encode(),
    }
    return Tokenizer(files, where="test")

def build(template: str | None, special: tuple[str, ...], **named: str | None) -> Tokenizer:
    """The base tokenizer with further special tokens, names for some, and a template."""
    fast = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    fast.add_special_tokens(list(special))
    return finished(fast, template, **named)

@cache
def styled(name: str, *, kind: str = "bytes", pad: str | None = None) -> Tokenizer:
    """A style's tokenizer.

    kind    bytes: byte-level BPE; pieces: as SentencePiece's, spaces are U+2581, and characters it
            does not know are bytes
    """
    style = styles()[name]
    if kind == "bytes":
        fast = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json"))
    else:
        fast = _pieces()
    added = [AddedToken(token, rstrip=token in style.greedy, normalized=False)
             for token in dict.fromkeys((*style.special, *([pad] if pad else [])))]  # fmt: skip
    fast.add_special_tokens(added)
    return finished(
        fast, style.template, bos_token=style.bos, eos_token=style.eos, pad_token=pad or style.eos
    )

def _pieces() -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    known = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    known += [chr(code) for code in range(33, 127)] + ["".join(merge) for merge in merges]
    vocab = {token: id_ for id_, token in enumerate(known)}
    fast = tokenizers.Tokenizer(
        models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    fast.normalizer = normalizers.Sequence([
        normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
    ])  # fmt: skip
    fast.decoder = decoders.Sequence([
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()
    ])  # fmt: skip
    return fast
