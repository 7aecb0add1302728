"""Seeds are functions of what they are for, and no two purposes share one; the same bits."""

import os
import pytest
import torch
from ftcore.env.compute import derived, generator, resolve_device, use_deterministic

def test_keys_of_any_length_have_seeds_of_their_own() -> None:
    keys = [(), (0,), (1,), (2,), (0, 0), (1, 0), (0, 1), (1, 1), (1, 0, 0), (2, 0)]
    seeds = {derived(seed, *key) for seed in range(20) for key in keys}
    assert len(seeds) == 20 * len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)

def test_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    one, two = generator(0, 1), generator(0, 1)
    assert torch.equal(torch.rand(5, generator=one), torch.rand(5, generator=two))
    assert torch.equal(torch.get_rng_state(), before)

def test_the_switch_of_deterministic_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    try:
        use_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
        use_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.empty(9).isnan().all()
    finally:
        use_deterministic(before)

def test_a_gpu_is_taken_where_there_is_one_unless_another_device_is_named(monkeypatch) -> None:
    assert resolve_device("auto").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cpu").type == "cpu"
