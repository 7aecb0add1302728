"""kernels/attention_decode_triton.py in the interpreter, by the pass rule of the eager path."""

from collections.abc import Callable
import pytest
import torch
from torch import Tensor
from kernels.attention_decode import attention_decode, attention_decode_reference
from tests.kernels import interpreter

interpreter.require()

from kernels import attention_decode_triton as module  # noqa: E402

# of shares without a slot, whose o is not read
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value)")

# Blocks of the interpreter are 16 slots; 24 programs share the work, so 4 shares for 6 of them.
# lengths, slots of a page, pages of a sequence (None: slabs), (query heads, key heads, width)
SHAPES = [
    ([1], 1, None, (1, 1, 1)),
    ([5, 1, 9], 9, None, (4, 2, 16)),
    ([123, 6, 42], 130, None, (6, 3, 5)),
    ([150, 1, 64], 16, 10, (4, 2, 32)),
    ([70, 33], 7, 11, (40, 1, 9)),
]
RULES = [{}, {"window": 5}, {"softcap": 0.7}, {"window": 40, "softcap": 2.0}]

@pytest.fixture
def make(draw: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Inputs whose unused slots, pages and entries of the table are not to be read."""

    def inputs(lengths, slots, num_pages, heads) -> dict[str, Tensor]:
        (H, G, D), B = heads, len(lengths)
        table_BJ = torch.arange(B)[:, None]
        if num_pages is not None:
            order = torch.randperm(B * num_pages + 3, generator=torch.Generator().manual_seed(0))
            table_BJ = order[: B * num_pages].view(B, num_pages)
        num_slots = (B if num_pages is None else B * num_pages + 3), slots
        caches = [draw(*num_slots, G, D, seed=seed) for seed in (1, 2)]
        used = torch.zeros(num_slots, dtype=torch.bool)
        for table, length in zip(table_BJ, lengths, strict=True):
            slot = torch.arange(length)
            used[table[slot // slots], slot % slots] = True
            table[-(-length // slots) :] = 1 << 28
        for cache in caches:
            cache[~used] = float("nan")
        pages_BJ = None if num_pages is None else table_BJ.int()
        named = {"q_BHD": draw(B, H, D), "k_PSGD": caches[0], "v_PSGD": caches[1]}
        return {**named, "lengths_B": torch.tensor(lengths), "pages_BJ": pages_BJ}

    return inputs

def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    is_float = {name: x is not None and x.is_floating_point() for name, x in inputs.items()}
    return {name: x.to(dtype) if is_float[name] else x for name, x in inputs.items()}

def keeps_budget(inputs: dict[str, Tensor], dtype: torch.dtype, change=None, **rule) -> bool:
    rule = {"scale": 0.3, **rule}
    true = attention_decode_reference(**inputs, **rule)
    plain = attention_decode_reference(**cast(inputs, dtype), **rule).double()
    mine = attention_decode(**cast(inputs, dtype), **rule | (change or {}), impl="triton")
    assert mine.dtype == dtype and mine.is_contiguous()
    budget = 2 * (plain - true).abs().max() + torch.finfo(dtype).eps * true.square().mean().sqrt()
    return bool((mine.double() - true).abs().max() <= budget)

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget(shape, rule, make, poisoned) -> None:
    assert keeps_budget(make(*shape), torch.float32, **rule)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_budget_of_short_dtypes(shape, dtype, make, poisoned) -> None:
    for rule in (RULES[0], RULES[3]):
        assert keeps_budget(make(*shape), dtype, **rule)

@pytest.mark.parametrize("programs", [1, 3, 64])
def test_any_number_of_splits(programs, make, poisoned, monkeypatch) -> None:
    monkeypatch.setattr(module.launch, "num_programs", lambda *_: programs)
    assert keeps_budget(make([150, 1], 16, 10, (2, 1, 200)), torch.float32)

@pytest.mark.parametrize(
    "change", [{"scale": 0.301}, {"window": 39}, {"window": None}, {"softcap": 2.01}],
    ids=lambda change: " ".join(change),
)  # fmt: skip
def test_error_budget_sees_other_settings(change, make) -> None:
    assert not keeps_budget(make(*SHAPES[2]), torch.float32, change, **RULES[3])

MUTANTS = {
    "length": ("offs_s < length)", "offs_s < length - 1)"),
    "last slot": ("s * factor, float", "s * factor, 0 * float"),
    "window": ("length - window, 0", "length - window + 1, 0"),
    "border of a share": ("tl.minimum(begin + share, length)", "tl.minimum(begin + share, 48)"),
    "share": ("first + split * share", "first + split * (share - BLOCK_S)"),
    "page": ("(slot % S)", "(slot % (S - 1))"),
    "next page": ("step + BLOCK_S + offs_s", "step + offs_s"),
    "decay": ("row_sum * decay +", "row_sum +"),
    "lse": ("row_max + tl.log2(row_sum)", "row_max + tl.log2(row_sum * (1 + 0.01 * split))"),
    "weight": ("tl.exp2(lse - ", "tl.exp(lse - "),
    "empty share": ("mask=(weight > 0)", "mask=(weight >= 0)"),
    "soft cap": ("(softcap or scale)", "scale"),
}

@pytest.mark.parametrize("name", MUTANTS)
def test_error_budget_sees_a_mutant(name, make, monkeypatch, tmp_path) -> None:
    inputs, rule = make(*SHAPES[3]), {"window": 140, "softcap": 2.0}
    assert keeps_budget(inputs, torch.float32, **rule)
    interpreter.mutate(monkeypatch, tmp_path, module.__name__, *MUTANTS[name])
    assert not keeps_budget(inputs, torch.float32, **rule)

def test_layout_is_free_and_nothing_is_copied(make, monkeypatch) -> None:
    """Also what the cache of ftcore hands over: the first slots of slabs laid out (B, G, S, D)."""
    inputs = cast(make(*SHAPES[2]), torch.float32)
    true = attention_decode(**inputs, impl="triton")
    strided = inputs | {"q_BHD": inputs["q_BHD"].transpose(0, 1).contiguous().transpose(0, 1)}
    for name, size in (("k_PSGD", (3, 3, 150, 5)), ("v_PSGD", (3, 130, 5, 3))):
        wide = torch.full(size, float("nan"))
        view = wide.transpose(1, 2)[:, :130] if size[1] == 3 else wide.transpose(2, 3)
        strided[name] = view.copy_(inputs[name])
    assert torch.equal(attention_decode(**strided, impl="triton"), true)
    launched = []
    stand_in = {grid: lambda *args, **_: launched.append(args) for grid in [(3, 3, 4), (18,)]}
    monkeypatch.setattr(module, "_attention_decode_kernel", stand_in)
    monkeypatch.setattr(module, "_attention_decode_sum_kernel", stand_in)
    attention_decode(**strided, impl="triton")
    assert launched[0][1] is strided["k_PSGD"] and launched[0][2] is strided["v_PSGD"]

def test_a_page_table_of_any_stride(make) -> None:
    inputs = cast(make(*SHAPES[3]), torch.float32)
    true = attention_decode(**inputs, impl="triton")
    pages_BJ = inputs["pages_BJ"].t().contiguous().t()
    assert torch.equal(attention_decode(**inputs | {"pages_BJ": pages_BJ}, impl="triton"), true)

def test_no_sequences(make) -> None:
    inputs = {name: x[:0] for name, x in make([1], 16, 1, (2, 1, 8)).items()}
    assert attention_decode(**cast(inputs, torch.float32), impl="triton").shape == (0, 2, 8)

def test_refuses_what_no_kernel_takes(make) -> None:
    def refuse(match: str, **change: Tensor) -> None:
        inputs = cast(make([4, 9], 16, 2, (4, 2, 8)), torch.float32)
        with pytest.raises(ValueError, match=match):
            attention_decode(**inputs | change, impl="triton")

    wide = {name: torch.ones(7, 16, 2, 257) for name in ("k_PSGD", "v_PSGD")}
    refuse("attention_decode: size 1028, at most 1024", q_BHD=torch.ones(2, 4, 257), **wide)
    refuse("3 query heads are not a multiple of 2 key heads", q_BHD=torch.ones(2, 3, 8))
    refuse(r"k has shape \(7, 16, 2, 9\), must be \(7, 16, 2, 8\)", k_PSGD=torch.ones(7, 16, 2, 9))
    refuse(r"k has shape \(7, 16, 2, 8\), must be \(2, 16, 2, 8\)", pages_BJ=None)
    refuse(r"v has shape \(7, 15, 2, 8\), must be", v_PSGD=torch.ones(7, 15, 2, 8))
    refuse(r"lengths has shape \(3,\), must be \(2,\)", lengths_B=torch.ones(3).long())
    refuse(r"pages has shape \(3, 2\), must be \(2, 2\)", pages_BJ=torch.ones(3, 2).int())
    refuse("v is torch.float16, must be torch.float32", v_PSGD=torch.ones(7, 16, 2, 8).half())
    refuse("lengths is torch.int32, must be torch.int64", lengths_B=torch.ones(2).int())
    refuse("pages is torch.int64, must be torch.int32", pages_BJ=torch.ones(2, 2).long())
    refuse("pages is on meta, must be on cpu", pages_BJ=torch.ones(2, 2, device="meta").int())
