"""kernels/attention.py against its definition, for every form of group that `Docs` plans."""

from collections.abc import Callable
from functools import partial
import pytest
import torch
from torch import Tensor
from kernels.attention import attention, attention_reference
from kernels.docs import LONG, Docs
from kernels.meter import Meter
from kernels.recompute import computed_again

# lengths, (query heads, key heads, width)
SHAPES = [
    ([1], (1, 1, 1)),
    ([5, 5, 5], (4, 2, 16)),
    ([7, 1, 64, 3], (6, 3, 5)),
    ([8, 8, 7, 7, 6], (4, 2, 8)),
    ([40] * 9, (4, 2, 16)),  # ten bins, of which one is filling
    ([70, 70], (3, 1, 8)),
    ([3, 66, 66, 2, 123, 66, 64, 130, 130], (4, 2, 8)),
    ([LONG + 11, 3], (2, 1, 4)),
]
MIXED, HEADS = SHAPES[6]
# Among the lengths of MIXED are some below, some equal to and some above 66.
RULES = [{}, {"window": 3}, {"window": 66, "softcap": 2.0}]

@pytest.fixture
def make(draw: Callable[..., Tensor]) -> Callable[..., dict[str, Tensor]]:
    def inputs(lengths: list[int], heads: tuple[int, int, int]) -> dict[str, Tensor]:
        (H, G, D), N = heads, sum(lengths)
        return {
            "q_NHD": draw(N, H, D),
            "k_NGD": draw(N, G, D, seed=1),
            "v_NGD": draw(N, G, D, seed=2),
        }

    return inputs

@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("lengths", "heads"), SHAPES)
def test_error_budget(lengths, heads, dtype, is_causal, rule, make, within_budget) -> None:
    settings = {"docs": Docs.from_lengths(lengths), "is_causal": is_causal, "scale": 0.3, **rule}
    op, reference = partial(attention, **settings), partial(attention_reference, **settings)
    assert within_budget(op, reference, make(lengths, heads), dtype)

@pytest.mark.parametrize(
    "change",
    [
        {"scale": 0.301},
        {"is_causal": True},
        {"docs": Docs.from_lengths([69, *MIXED[2:]])},
        {"docs": Docs.from_lengths([4, 65, *MIXED[2:]])},
        {"window": 67},
        {"window": None},
        {"softcap": 2.01},
    ],
    ids=["scale", "mask", "two documents as one", "border", "window", "no window", "soft cap"],
)
def test_error_budget_sees_a_mutant(change, make, within_budget) -> None:
    settings = {"docs": Docs.from_lengths(MIXED), "is_causal": False, "scale": 0.3, **RULES[-1]}
    reference = partial(attention_reference, **settings)
    mutant = partial(attention, **settings | change)
    assert not within_budget(mutant, reference, make(MIXED, HEADS), torch.float32)

@pytest.mark.parametrize("rule", [{}, {"window": 2, "softcap": 1.5}])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("op", [attention, attention_reference])
def test_gradcheck(op: Callable[..., Tensor], is_causal: bool, rule, make) -> None:
    """`op` too: its gradients are written by hand."""
    lengths = [3, 129, 2]
    docs = Docs.from_lengths(lengths)
    tensors = [t.requires_grad_() for t in make(lengths, (2, 1, 1)).values()]
    call = partial(op, docs=docs, is_causal=is_causal, scale=0.7, **rule)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)

def test_default_scale_and_non_contiguous_inputs(make) -> None:
    docs = Docs.from_lengths(MIXED)
    q_NHD, k_NGD, v_NGD = make(MIXED, HEADS).values()
    fused = torch.cat([q_NHD, k_NGD, v_NGD], dim=1)
    parts = fused.split([4, 2, 2], dim=1)
    assert not parts[0].is_contiguous()
    true = attention_reference(q_NHD, k_NGD, v_NGD, docs, is_causal=True, scale=8**-0.5)
    torch.testing.assert_close(attention(*parts, docs, is_causal=True), true)

@pytest.mark.parametrize("is_causal", [True, False])
def test_documents_do_not_see_each_other(is_causal: bool, make) -> None:
    """Other values in one document change no bit of the others."""
    docs = Docs.from_lengths(MIXED)
    tensors = {name: tensor.float() for name, tensor in make(MIXED, HEADS).items()}
    before = attention(**tensors, docs=docs, is_causal=is_causal)
    for document in (0, 1, 4):
        inside = docs.doc_of_N() == document
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in changed.values():
            tensor[inside] += 3.0
        after = attention(**changed, docs=docs, is_causal=is_causal)
        assert torch.equal(before[~inside], after[~inside])
        assert not torch.equal(before[inside], after[inside])

@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_document(value: float, is_causal: bool, make) -> None:
    lengths = [2, 5, 3, 4, 2]  # in one bin, with the first as its filling
    docs = Docs.from_lengths(lengths)
    for name, poisoned in make(lengths, (4, 2, 8)).items():
        tensors = make(lengths, (4, 2, 8)) | {name: poisoned}
        poisoned[0] = value
        leaves = [tensor.requires_grad_() for tensor in tensors.values()]
        o_NHD = attention(**tensors, docs=docs, is_causal=is_causal)
        found = [o_NHD, *torch.autograd.grad(o_NHD.sum(), leaves)]
        assert all(tensor[2:].isfinite().all() for tensor in found)
        assert not all(tensor[:2].isfinite().all() for tensor in found)

def test_one_plan_serves_several_rules(make) -> None:
    """Its masks are kept by rule."""
    tensors, docs = make([7, 20, 3], (4, 2, 8)), Docs.from_lengths([7, 20, 3])
    for is_causal, window in ((True, None), (False, None), (False, 2), (True, 2), (True, 5)) * 2:
        rule = {"docs": docs, "is_causal": is_causal, "scale": 0.3, "window": window}
        torch.testing.assert_close(
            attention(**tensors, **rule), attention_reference(**tensors, **rule)
        )

@pytest.mark.parametrize("lengths", [MIXED, [3, 66, 7], [66, 7, 3]])
def test_rows_past_the_documents_are_zero_and_change_nothing(lengths: list[int], make) -> None:
    docs = Docs.from_lengths(lengths)
    N, rest = docs.num_tokens, docs.num_rows - docs.num_tokens
    assert rest
    short = make(lengths, HEADS)
    long = {name: torch.cat([t, torch.full_like(t[:rest], 9.0)]) for name, t in short.items()}
    found = {}
    for form, tensors in (("short", short), ("long", long)):
        leaves = [tensor.requires_grad_() for tensor in tensors.values()]
        o_NHD = attention(**tensors, docs=docs, is_causal=False)
        loss = (o_NHD * o_NHD.detach().cos()).sum()
        found[form] = [o_NHD.detach(), *torch.autograd.grad(loss, leaves)]
    for mine, true in zip(found["long"], found["short"], strict=True):
        assert torch.equal(mine[:N], true) and not mine[N:].any()

def test_refuses_sizes_that_do_not_fit(make) -> None:
    tensors = make([4], (4, 2, 8))
    with pytest.raises(ValueError, match="docs plans 5 tokens in 8 rows, q has 4, k 4"):
        attention(**tensors, docs=Docs.from_lengths([5]), is_causal=True)
    tensors["q_NHD"] = tensors["q_NHD"][:, :3]
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 key heads"):
        attention(**tensors, docs=Docs.from_lengths([4]), is_causal=True)

@pytest.mark.parametrize("lengths", [[LONG + 11, 3], [40, 30, 9]])
def test_a_graph_is_used_twice(lengths: list[int], make) -> None:
    leaves = [x.bfloat16().requires_grad_() for x in make(lengths, (2, 1, 8)).values()]
    o_NHD = attention(*leaves, Docs.from_lengths(lengths), is_causal=True)
    first, second = (
        torch.autograd.grad(o_NHD.sum(), leaves, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))

@pytest.mark.parametrize("lengths", [[LONG + 11, 3], [40, 30, 9]])
def test_what_is_computed_again_is_not_kept(lengths: list[int], make) -> None:
    docs, live = Docs.from_lengths(lengths), []
    assert docs.walk and docs.rows_of(2, docs.num_tokens)  # kept, for all layers
    x_NHD = make(lengths, (2, 2, 32))["q_NHD"].bfloat16().requires_grad_()
    layer = partial(attention, docs=docs, is_causal=True)
    run = lambda x_NHD: layer(x_NHD, x_NHD, x_NHD)  # noqa: E731
    run(x_NHD)  # masks are kept too
    for again in (False, True):
        with Meter() as meter:
            o_NHD = computed_again(run, x_NHD) if again else run(x_NHD)
            live.append(meter.live)
            o_NHD.sum().backward()
    plain, again = live
    assert again < o_NHD.nbytes + 1000 < plain

def test_a_sum_too_large_for_its_dtype_is_finite(make) -> None:
    """Else each document would be computed once more, in a bin of its own."""
    lengths = [40, 30, 9]
    tensors = {name: (x + 3).half() for name, x in make(lengths, (32, 32, 64)).items()}
    docs = Docs.from_lengths(lengths)
    o_NHD = attention(**tensors, docs=docs, is_causal=True)
    assert o_NHD.isfinite().all() and o_NHD.sum().isinf() and "apart" not in vars(docs)

def test_a_mask_takes_a_byte_for_each_pair(make) -> None:
    lengths = [LONG + 88]
    leaves = [x.bfloat16() for x in make(lengths, (1, 1, 8)).values()]
    docs = Docs.from_lengths(lengths)
    assert docs.walk and docs.rows_of(1, docs.num_tokens)
    with Meter() as meter:
        attention(*leaves, docs, is_causal=True, window=50)
    assert meter.peak < 6 * lengths[0] ** 2
