"""Triton's CPU interpreter for tests, with its bf16 made right, and kernels with one fault.

The interpreter keeps bf16 as its raw bits and computes on those as on integers; upstream declined
to change it (triton-lang/triton 10945, 11605). Here every operation on bf16 runs on fp32 and its
result is rounded to nearest even, which is what a GPU does.

TRITON_INTERPRET is set by tests/conftest.py: triton reads it when it is imported.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any
import numpy as np
import pytest

def require() -> None:
    """For the head of a test module: skips it where triton is not installed."""
    pytest.importorskip("triton", reason="triton is not installed: its kernels cannot run")
    _make_bf16_right()

def mutate(monkeypatch: pytest.MonkeyPatch, folder: Path, module: str, old: str, new: str) -> None:
    """Puts `new` for the one `old` in the source of a kernels module, for one test."""
    path = Path(__file__).parents[2] / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    mutant = folder / path.name
    mutant.write_text(text.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(module, mutant)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, loaded)
    spec.loader.exec_module(loaded)

def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 as bf16 bits, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)

@cache
def _make_bf16_right() -> None:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

    def is_bf16(x: Any) -> bool:
        return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16

    def wide(x: Any) -> Any:
        return TensorHandle(widen(x.data), tl.float32) if is_bf16(x) else x

    def in_fp32(method: Callable[..., Any], deciding: int = 0) -> Callable[..., Any]:
        """`method` on wide operands; the result is as wide as the operand that decides."""

        @wraps(method)
        def call(self: Any, *operands: Any) -> Any:
            if not any(map(is_bf16, operands)):
                return method(self, *operands)
            result = method(self, *map(wide, operands))
            if is_bf16(operands[deciding]) and result.data.dtype == np.float32:
                return TensorHandle(narrow(result.data), tl.bfloat16)
            return result

        return call

    deciding = {"ternary_op": 2, "create_fma": 2, "create_dot": 2}
    unary = ("unary_op", "create_erf", "create_rsqrt")
    for name in ("binary_op", *unary, *deciding):
        method = getattr(InterpreterBuilder, name)
        setattr(InterpreterBuilder, name, in_fp32(method, deciding.get(name, 0)))

    plain_cast = InterpreterBuilder.cast_impl

    def cast(self: Any, x: Any, to: Any, *_rounding: Any) -> Any:
        if to.scalar == tl.bfloat16:
            as_fp32 = wide(x).data.astype(np.float32)
            return TensorHandle(narrow(as_fp32), tl.bfloat16)
        return plain_cast(self, wide(x), to)

    InterpreterBuilder.cast_impl = cast
    plain_fp_to_fp = InterpreterBuilder.create_fp_to_fp

    def fp_to_fp(self: Any, x: Any, to: Any, rounding: Any) -> Any:
        if is_bf16(x) or to.scalar == tl.bfloat16:
            return cast(self, x, to)
        return plain_fp_to_fp(self, x, to, rounding)

    InterpreterBuilder.create_fp_to_fp = fp_to_fp

    def reduce_in_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
            if not is_bf16(x.handle):
                return method(self, x, *args, **kwargs)
            shape = tl.block_type(tl.float32, list(x.shape))
            result = method(self, tl.core.tensor(wide(x.handle), shape), *args, **kwargs)
            return interpreter.interpreter_semantic.cast(result, tl.bfloat16)

        return call

    ReduceOps.sum = reduce_in_fp32(ReduceOps.sum)
    ReduceOps.min_max = reduce_in_fp32(ReduceOps.min_max)
