"""Sequences that join, grow by tokens or chunks, and leave, against whole documents."""

import gc
import random
import weakref
import pytest
import torch
from ftcore.model.generate import advanced
from ftcore.model.heads import Model
from ftcore.model.load import load_model
from kernels.attention_cache import Cache
from kernels.docs import Docs

LENGTHS = [90, 3, 140, 17, 64, 33, 1, 70]

@pytest.fixture
def model(hf) -> Model:
    return load_model(hf("qwen3-untied")[1], task="lm", dtype=torch.float32).model

@torch.no_grad()
def grow(model: Model, cache: Cache, parts: list[tuple[int, list[int]]]) -> list[torch.Tensor]:
    """Add tokens to rows of the cache: the hidden states of each."""
    tokens_N, docs = cache.extend([row for row, _ in parts], [ids for _, ids in parts])
    h_NC = model.trunk(tokens_N, cache.slots_N, tokens_N * 0, docs, cache.attends)
    return list(h_NC.split(docs.lengths))

def whole(model: Model, ids: list[int]) -> torch.Tensor:
    docs = Docs.from_lengths([len(ids)])
    tokens_N = torch.tensor(ids)
    with torch.no_grad():
        return model.trunk(tokens_N, docs.positions_N(), tokens_N * 0, docs)

def test_any_order_of_steps_equals_whole_documents(lm_kind, hf, documents) -> None:
    """At each step some sequences read a token or a chunk, some join and some leave."""
    model = load_model(hf(lm_kind)[1], task="lm", dtype=torch.float32).model
    chance = random.Random(0)
    texts = documents(LENGTHS)
    wanted = [whole(model, text) for text in texts]
    cache = Cache(model.spec.num_layers, model.device)
    running, left, off = [], [*range(len(texts))], 0.0
    while left or running:
        if left and (not running or chance.random() < 0.4):
            assert cache.join() == len(running)
            running.append([left.pop(0), 0])  # which text, and how much of it is read
        parts = []
        for row, (text, done) in enumerate(running):
            if count := min(chance.choice([0, 1, 1, 1, 25]), len(texts[text]) - done):
                parts.append((row, texts[text][done : done + count]))
        chance.shuffle(parts)
        parts.sort(key=lambda part: (running[part[0]][1] == 0, len(part[1]) > 1))
        for (row, ids), h_TC in zip(parts, grow(model, cache, parts) if parts else (), strict=True):
            text, done = running[row]
            off = max(off, (h_TC - wanted[text][done : done + len(ids)]).abs().max().item())
            running[row][1] += len(ids)
        assert cache.lengths == [done for _, done in running]
        for row, (text, done) in reversed([*enumerate(running)]):
            if done == len(texts[text]):
                cache.leave(row)
                running[row] = running[-1]
                running.pop()
    assert off <= 2e-5

@pytest.mark.parametrize("count", [16, 17])  # of 17 the next size is 18
def test_a_step_needs_no_rows_beside_its_own(count) -> None:
    """A GPU fills up no stream, and adapters keep its passes from being replayed."""
    cache, draw = Cache(1, torch.device("cpu")), torch.Generator().manual_seed(0)
    rows, stored = [cache.join() for _ in range(count)], []
    for _ in range(2):
        _, docs = cache.extend(rows, [[1]] * count)
        q_NHD, k_NHD, v_NHD = torch.randn(3, count, 2, 16, generator=draw)
        stored.append((k_NHD, v_NHD))
        o_NHD = cache.attends[0](q_NHD, k_NHD, v_NHD, docs)
    k_BSHD, v_BSHD = (torch.stack(parts, 1) for parts in zip(*stored, strict=True))
    weights_BHS = (torch.einsum("bhd,bshd->bhs", q_NHD, k_BSHD) / 4).softmax(-1)
    assert torch.allclose(o_NHD, torch.einsum("bhs,bshd->bhd", weights_BHS, v_BSHD), atol=1e-5)

def test_tokens_are_copied_from_one_row_to_another(model, documents) -> None:
    (text,) = documents([50])
    cache = Cache(model.spec.num_layers, model.device)
    grow(model, cache, [(cache.join(), text[:40])])
    cache.write(cache.join(), cache.read(0, 30))
    assert cache.lengths == [40, 30]
    _, h_TC = grow(model, cache, [(0, [5, 6]), (1, text[30:])])
    assert (h_TC - whole(model, text)[30:]).abs().max() <= 2e-5

def test_memory_grows_with_the_longest_and_shrinks_when_it_has_left(model, documents) -> None:
    cache = Cache(model.spec.num_layers, model.device)
    grow(model, cache, [(cache.join(), documents([2 * 64 + 1])[0])])
    assert all(slab.shape == (2, 8, 2, 3 * 64, 16) for slab in cache.slabs)
    cache.leave(0)
    grow(model, cache, [(cache.join(), ids) for ids in documents([4] * 9)])
    assert all(slab.shape == (2, 16, 2, 64, 16) for slab in cache.slabs)

def test_slabs_are_freed_with_the_cache(model) -> None:
    """At once, not when the collector of cycles comes by: on a GPU they are large."""
    cache = Cache(model.spec.num_layers, model.device)
    advanced(model, cache, [cache.join()], [[1, 2]])
    slab = weakref.ref(cache.slabs[0])
    gc.disable()
    try:
        del cache
        assert slab() is None
    finally:
        gc.enable()

def test_a_stream_in_another_order_is_refused(model) -> None:
    cache = Cache(model.spec.num_layers, model.device)
    grow(model, cache, [(cache.join(), [1, 2])])
    with pytest.raises(AssertionError, match="single tokens, then chunks, then prompts"):
        grow(model, cache, [(cache.join(), [1, 2]), (0, [3])])
