"""kernels/attention_triton.py in the interpreter against the definition, and compiled for GPUs."""

from functools import partial
import pytest
import torch
from kernels.attention import attention, attention_reference
from kernels.docs import Docs
from tests.kernels import interpreter

interpreter.require()

from kernels import attention_triton as module  # noqa: E402

ATTENTION = partial(attention, impl="triton")

# of rows past a document's end, which are not stored
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|All-NaN)")

# Tiles of the interpreter are 32 rows by 16 columns. A width that is a power of two takes
# descriptors, the others do not.
SHAPES = [
    ([1], (1, 1, 16)),
    ([7, 1, 40, 3], (4, 2, 5)),
    ([33, 16], (2, 1, 96)),
    ([70, 3], (2, 1, 32)),
]
MIXED, HEADS = [3, 66, 1, 42], (2, 1, 16)
RULES = [{}, {"window": 3}, {"window": 20, "softcap": 2.0}]

def make(lengths: list[int], heads: tuple[int, int, int], draw) -> dict[str, torch.Tensor]:
    (H, G, D), N = heads, sum(lengths)
    k_NGD, v_NGD = draw(N, G, D, seed=1), draw(N, G, D, seed=2)
    return {"q_NHD": draw(N, H, D), "k_NGD": k_NGD, "v_NGD": v_NGD}

def keeps_budget(lengths, heads, dtype, draw, within_budget, change=None, **rule) -> bool:
    settings = {"docs": Docs.from_lengths(lengths), "scale": 0.3, **rule}
    op = partial(ATTENTION, **settings | (change or {}))
    reference = partial(attention_reference, **settings)
    return within_budget(op, reference, make(lengths, heads, draw), dtype)

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("lengths", "heads"), SHAPES)
def test_error_budget(lengths, heads, is_causal, rule, draw, within_budget, poisoned) -> None:
    rule = {"is_causal": is_causal, **rule}
    assert keeps_budget(lengths, heads, torch.float32, draw, within_budget, **rule)

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False])
def test_error_budget_of_short_dtypes(is_causal, dtype, draw, within_budget, poisoned) -> None:
    for rule in (RULES[0], RULES[2]):
        rule = {"is_causal": is_causal, **rule}
        assert keeps_budget(MIXED, HEADS, dtype, draw, within_budget, **rule)

def test_a_wide_soft_cap_keeps_the_digits_of_small_scores(draw, within_budget) -> None:
    rule = {"is_causal": True, "softcap": 50.0}
    assert keeps_budget([40], (1, 1, 16), torch.float32, draw, within_budget, **rule)

@pytest.mark.parametrize(
    "change",
    [{"scale": 0.301}, {"is_causal": True}, {"window": 21}, {"window": None}, {"softcap": 2.01}],
    ids=lambda change: " ".join(change),
)
def test_error_budget_sees_other_settings(change, draw, within_budget) -> None:
    rule = {"is_causal": False, **RULES[2]}
    fails = not keeps_budget(MIXED, HEADS, torch.float32, draw, within_budget, change, **rule)
    assert fails

MUTANTS = {
    "diagonal": ("offs_q >= offs_k", "offs_q > offs_k"),
    "document's end": ("offs_n < past)[None, :]\n            sees = _sees(offs_m[:, None], "
                       "offs_n[None, :], inside, window, IS_CAUSAL)\n            s =",
                       "offs_n < past + 1)[None, :]\n            sees = _sees(offs_m[:, None], "
                       "offs_n[None, :], inside, window, IS_CAUSAL)\n            s ="),
    "edge before the whole steps": ("tile, factor, squash, window, IS_CAUSAL, D, BLOCK_N,\n"
                                    "                                           is_edge)",
                                    "(past, *tile[2:3], *tile[2:]), factor, squash, window, "
                                    "IS_CAUSAL, D, BLOCK_N, is_edge)"),
    "delta": ("o.to(tl.float32) * do", "1.01 * o.to(tl.float32) * do"),
    "lse": ("row_max + tl.log2(row_sum)", "row_max + tl.log2(row_sum * 1.001)"),
    "dk": ("dk * scale", "dk"),
    "group": ("key_head * GROUP + GROUP)", "key_head * GROUP + 1)"),
}  # fmt: skip

@pytest.mark.parametrize("name", MUTANTS)
def test_error_budget_sees_a_mutant(name, draw, within_budget, monkeypatch, tmp_path) -> None:
    interpreter.mutate(monkeypatch, tmp_path, module.__name__, *MUTANTS[name])
    is_causal = name != "document's end"
    rule = {"is_causal": is_causal, "window": 20}
    assert not keeps_budget(MIXED, HEADS, torch.float32, draw, within_budget, **rule)

def test_parts_of_a_fused_projection_and_the_default_scale(draw) -> None:
    """They are read where they lie; heads that do not lie side by side are copied."""
    docs = Docs.from_lengths(MIXED)
    q_NHD, k_NGD, v_NGD = (x.float() for x in make(MIXED, HEADS, draw).values())
    true = attention_reference(q_NHD, k_NGD, v_NGD, docs, is_causal=True, scale=0.25)
    parts = torch.cat([q_NHD, k_NGD, v_NGD], dim=1).split([2, 1, 1], dim=1)
    assert module._packed(parts[0]) is parts[0] and not parts[0].is_contiguous()
    strided = (q_NHD.transpose(0, 1).contiguous().transpose(0, 1), k_NGD, v_NGD)
    for streams in (parts, strided):
        torch.testing.assert_close(ATTENTION(*streams, docs, is_causal=True), true)

def test_what_is_not_finite_stays_in_its_document(draw) -> None:
    docs = Docs.from_lengths(MIXED)
    for name in ("q_NHD", "k_NGD", "v_NGD"):
        tensors = {key: x.float() for key, x in make(MIXED, HEADS, draw).items()}
        tensors[name][3:69] = float("nan")
        leaves = [x.requires_grad_() for x in tensors.values()]
        o_NHD = ATTENTION(*leaves, docs, is_causal=False)
        assert o_NHD[3:69].isnan().any()
        for found in (o_NHD, *torch.autograd.grad(o_NHD.sum(), leaves)):
            assert found[:3].isfinite().all() and found[69:].isfinite().all()

def test_rows_past_the_documents_are_zero_and_change_nothing(draw, poisoned) -> None:
    docs = Docs.from_lengths([30, 11, 32])
    N, rest = docs.num_tokens, docs.num_rows - docs.num_tokens
    assert rest
    short = [x.float() for x in make([30, 11, 32], HEADS, draw).values()]
    long = [torch.cat([x, torch.full_like(x[:rest], float("nan"))]) for x in short]
    found = []
    for streams in (short, long):
        leaves = [x.requires_grad_() for x in streams]
        o_NHD = ATTENTION(*leaves, docs, is_causal=True)
        found.append([o_NHD, *torch.autograd.grad(o_NHD.sum(), leaves)])
    for true, mine in zip(*found, strict=True):
        assert torch.equal(mine[:N], true) and not mine[N:].any()

def test_tiles_hold_what_rows_see() -> None:
    """Against the definition, by counting; and the longest tile comes first."""
    lengths = [5, 1, 37, 20]
    docs = Docs.from_lengths(lengths)
    doc_N, row_N = docs.doc_of_N(), torch.arange(sum(lengths))
    for back, ahead in ((63, 0), (0, 63), (63, 63), (6, 0), (6, 6), (0, 6)):
        away_NN = row_N[None] - row_N[:, None]
        seen_NN = (away_NN >= -back) & (away_NN <= ahead) & (doc_N[:, None] == doc_N[None])
        table = docs.tiles(8, 4, back=back, ahead=ahead)
        assert table.dtype == torch.int32 and docs.tiles(8, 4, back=back, ahead=ahead) is table
        rows = []
        for row, past, first, whole, edge, stop in table.tolist():
            rows += (mine := list(range(row, min(row + 8, past))))
            seen_nN = seen_NN[mine]
            columns = seen_nN.any(0).nonzero()
            assert (first, stop) == (columns.min(), columns.max() + 1)
            assert seen_nN[:, whole:edge].all() and (edge - whole) % 4 == 0 <= edge - whole
            assert past == sum(lengths[: doc_N[row] + 1]) and (whole - first) % 4 == 0
        assert sorted(rows) == row_N.tolist()
        work = table[:, 5] - table[:, 2]
        assert work.equal(work.sort(descending=True).values)

def test_refuses_what_no_kernel_takes(draw) -> None:
    def refuse(match: str, change: dict | None = None, **rule) -> None:
        tensors = {name: x.float() for name, x in make([4], (4, 2, 8), draw).items()}
        tensors |= change or {}
        rule = {"docs": Docs.from_lengths([4]), "is_causal": True, **rule}
        with pytest.raises(ValueError, match=match):
            ATTENTION(**tensors, **rule)

    long = Docs.from_lengths([5])
    refuse("docs plans 5 tokens in 8 rows, q has 4, k 4", docs=long)
    refuse("3 query heads are not a multiple of 2 key heads", {"q_NHD": torch.ones(4, 3, 8)})
    refuse(r"v has shape \(4, 2, 9\), must be \(4, 2, 8\)", {"v_NGD": torch.ones(4, 2, 9)})
    wide = {name: torch.ones(4, 2, 257) for name in ("q_NHD", "k_NGD", "v_NGD")}
    refuse("attention_fwd: size 257, at most 256; pass impl='eager'", wide)
    wide = {"q_NHD": torch.ones(4, 4, 8).double()}
    refuse("impl = 'triton' on torch.float64: kernels take", wide)
    half = {"k_NGD": torch.ones(4, 2, 8).half()}
    refuse("k is torch.float16, must be torch.float32; cast it", half)
    refuse("v is on meta, must be on cpu", {"v_NGD": torch.ones(4, 2, 8, device="meta")})
    for name in ("scale", "window", "softcap"):
        refuse(f"{name} = 0: must be > 0", **{name: 0})
