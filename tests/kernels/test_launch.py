"""kernels/launch.py and kernels/backend.py: what is refused, in which words, and what is chosen."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from kernels import backend, check, launch
from tests.kernels import interpreter

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

def test_auto_is_eager_on_a_cpu() -> None:
    x = torch.ones(1)
    assert not backend.uses_triton("op", "auto", x) and not backend.uses_triton("op", "eager", x)

def test_refuses_what_cannot_run(monkeypatch) -> None:
    with pytest.raises(ValueError, match="impl = 'cuda': must be 'auto', 'eager' or 'triton'"):
        backend.uses_triton("op", "cuda", torch.ones(1))
    with pytest.raises(ValueError, match="impl = 'triton' on torch.float64: kernels take"):
        backend.uses_triton("op", "triton", torch.ones(1, dtype=torch.float64))
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    with pytest.raises(ValueError, match="impl = 'triton' on cpu: kernels need a GPU"):
        backend.uses_triton("op", "triton", torch.ones(1))
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed; install it or pass 'eager'"):
        backend.uses_triton("op", "triton", torch.ones(1))

def test_the_smallest_row_that_is_large_enough_serves(monkeypatch) -> None:
    one, two, three = ({"BLOCK": value} for value in (1, 2, 3))
    rows = {("op", "any"): {8: one, 64: two}, ("op", "sm_90"): {9: three}}
    rows |= {("op", "any_fp32"): {64: one}, ("op", "sm_90_short"): {64: two}}
    monkeypatch.setattr(launch, "configs", lambda: rows)
    assert launch.config_of("op", 8, CPU) is one and launch.config_of("op", 9, CPU) is two
    assert launch.config_of("op", 9, CPU, shape="fp32") is one
    with pytest.raises(ValueError, match="op: size 65, at most 64; pass impl='eager'"):
        launch.config_of("op", 65, CPU)
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm_90")
    assert launch.config_of("op", 9, CPU) is three
    assert launch.config_of("op", 9, CPU, shape="short") is two
    assert launch.config_of("op", 9, CPU, shape="fp32") is one

def test_checks_name_value_limit_and_remedy() -> None:
    x = torch.ones(2, 3)
    launch.check(CPU, (2, 3), x=x.half(), bias=None)
    launch.check(CPU, (2, 3), torch.float32, x=x, bias=None)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\), must be \(3, 2\)"):
        launch.check(CPU, (3, 2), x=x)
    with pytest.raises(ValueError, match="x is on meta, must be on cpu; move it there"):
        launch.check(CPU, (2, 3), x=x.to("meta"))
    with pytest.raises(ValueError, match="x is torch.float16, must be torch.float32; cast it"):
        launch.check(CPU, (2, 3), torch.float32, x=x.half())

def test_ops_are_imported_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\nimport kernels.backend, kernels.launch"
    ops = ", ".join(
        f"kernels.{op}" for op in ("norm", "rope", "swiglu", "cross_entropy", "lora")
    )
    command = [sys.executable, "-c", f"{code}, {ops}"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0

def test_auto_on_a_gpu_goes_by_dtype_size_and_device(monkeypatch) -> None:
    """Told by a stand-in for a tensor of a GPU, since there may be none."""
    monkeypatch.setattr(backend, "_passes", lambda op, device, dtype: device == "new")
    narrow, wide, widest = (
        SimpleNamespace(is_cuda=True, dtype=dtype, device="new")
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    assert backend.uses_triton("op", "auto", narrow) and backend.uses_triton("op", "auto", wide)
    assert not backend.uses_triton("op", "auto", widest)
    assert not backend.uses_triton("op", "auto", wide, fits=False)
    wide.device = "old"
    assert not backend.uses_triton("op", "auto", wide)

def test_a_wrong_kernel_fails_its_case(monkeypatch, tmp_path, capsys) -> None:
    interpreter.require()
    assert check.passes("swiglu", CPU, torch.float32)
    change = "(dy * value)", "(dy * value * 1.001)"
    interpreter.mutate(monkeypatch, tmp_path, "kernels.swiglu_triton", *change)
    assert not check.passes("swiglu", CPU, torch.float32)
    assert check.main(["swiglu"]) == 1
    monkeypatch.setitem(sys.modules, "kernels.swiglu_triton", None)  # it cannot be imported
    assert check.main(["swiglu", "rope"]) == 1
    torch.use_deterministic_algorithms(False)
    first, second = (out.splitlines() for out in capsys.readouterr().out.split("the largest")[1:])
    assert [line[:11] for line in first[1:-1]].count("FAIL swiglu") == 2
    assert "ModuleNotFoundError" in second[1] and second[-2].startswith("ok   rope")
    assert second[-1] == '{"broken": 4}'

def test_auto_tries_an_op_once_and_tells_where_its_kernels_fail(monkeypatch, caplog) -> None:
    tried, results = [], iter([True, False, RuntimeError("no such instruction")])

    def passes(*key: object) -> bool:
        tried.append(key)
        torch.rand(1)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if isinstance(result := next(results), Exception):
            raise result
        return result

    monkeypatch.setattr(check, "passes", passes)
    backend._passes.cache_clear()
    before = torch.get_rng_state()
    try:
        with torch.inference_mode():
            found = [backend._passes(op, CPU, torch.float16) for op in ("a", "a", "b", "b", "c")]
    finally:
        backend._passes.cache_clear()
    assert found == [True, True, False, False, False] and len(tried) == 3
    assert torch.get_rng_state().equal(before)  # or a resumed run would draw other masks
    assert caplog.messages == [
        f"{op} in torch.float16 runs eagerly on cpu, its kernels failed their test: {reason}"
        for op, reason in (
            ("b", "their errors are larger than eager's"),
            ("c", "RuntimeError: no such instruction"),
        )
    ]
