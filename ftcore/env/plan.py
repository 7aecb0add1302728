"""What a run will do, said before it does it: steps, tokens, memory.

The memory of a step is counted, not estimated: its forward and backward passes run on tensors that
have sizes and no values, so all that autograd saves and all that operations make is seen. A GPU is
asked what they took, unless they take more than it has."""

from collections.abc import Callable, Sequence
from contextlib import suppress
import numpy as np
from torch import Tensor, cuda, nn
from ftcore.config import Run
from ftcore.data.pack import Batch, Encoded, collate, lengths, split
from ftcore.model.heads import Model
from kernels.docs import pack
from kernels.memory import free_bytes
from kernels.meter import passes_bytes

MIB = 2**20
LINEAR_TOKENS = 4096  # from here on memory grows with the tokens: chunks of logits are full
Loss = Callable[[Model, Batch], tuple[Tensor, Tensor]]

def step_bytes(model: Model, loss: Loss, documents: Sequence[Encoded],
               is_taken: bool = False) -> dict[str, int]:
    """Of one micro-batch: see `meter.passes_bytes`."""
    batch = collate(documents).to(model.device)
    batch.docs.walk  # noqa: B018  # planned by values, and kept
    return passes_bytes(lambda: loss(model, batch)[0], model, model.trunk, is_taken=is_taken)

def planned(config: Run, model: nn.Module, documents: Sequence[Encoded],
            loss: Loss | None = None) -> tuple[dict[str, int], str]:
    """Bytes by component that a run holds from start to end, its model on its device (also for rows
    of embeddings that the data never read, which need none), and the plan in words. A `loss` adds
    what a step takes, by the first micro-batch of one that has the longest rows, in each process,
    and the largest micro-batch that would fit."""
    lengths_B, size = lengths(documents), config.optim.batch_size
    longest = np.argsort(-lengths_B, kind="stable")[:size]
    budget, device = config.loop.micro_batch_tokens, next(model.parameters()).device
    shares = min(config.env.threads, size) if device.type == "cpu" else 1
    trained = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    widths = {4} if lengths_B[longest].sum() > budget else {p.element_size() for p in trained}
    held = {"weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
            "masters": 4 * sum(p.numel() for p in trained if p.element_size() < 4),
            "gradients": shares * max(widths) * count,
            "moments": (12 if config.optim.ema else 8) * count}
    memory, more = dict(held), ""
    if loss is not None:
        def counted(documents: Sequence[Encoded]) -> dict[str, int]:
            if device.type == "cuda":
                with suppress(cuda.OutOfMemoryError):
                    return step_bytes(model, loss, documents, is_taken=True)
            model.use_kernels("eager")  # Triton's want values: a GPU needs less than is then said
            return step_bytes(model, loss, documents)
        room = free_bytes(device) + (held["weights"] if device.type == "cpu" else 0)
        mine = longest[split(lengths_B[longest], shares)[0]]
        heaviest = [documents[int(mine[i])] for i in pack(lengths_B[mine], budget)[0]]
        memory |= {name: shares * each for name, each in counted(heaviest).items()}
        tokens, peak = sum(map(len, heaviest)), sum(memory.values())
        many = heaviest * -(-LINEAR_TOKENS // tokens)
        per_token = sum(counted(many).values()) / sum(map(len, many))
        fits = max(0, int((room - sum(held.values())) / shares / per_token))
        more = (f"\npredicted peak with micro-batches of {tokens:,} tokens: {peak / MIB:,.1f} MiB"
                f" of {room / MIB:,.1f}; the largest that fit have {fits:,} tokens")
    steps = config.loop.num_steps(len(documents), config.rows_per_step)
    parts = "  ".join(f"{name} {each / MIB:.1f}" for name, each in memory.items())
    return memory, (f"{steps} steps; an epoch is {len(documents)} rows, {lengths_B.sum()} tokens"
                    f"\nmemory, MiB: {parts}{more}")
