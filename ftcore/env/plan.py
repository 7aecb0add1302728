"""What a run will do, said before it does it: steps, tokens, memory.

The memory of a step is counted, not estimated: its forward and backward passes run on tensors that
have sizes and no values, so all that autograd saves and all that operations make is seen."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ftcore.config import Run
from ftcore.data.pack import Batch, Encoded, collate, lengths, pack, split
from ftcore.model.heads import Model
from kernels.memory import free_bytes
from kernels.meter import Meter, heap_bytes

MIB = 2**20
LINEAR_TOKENS = 4096  # from here on memory grows with the tokens: chunks of logits are full
Loss = Callable[[Model, Batch], tuple[Tensor, Tensor]]

def step_bytes(model: Model, loss: Loss, documents: Sequence[Encoded]) -> dict[str, int]:
    """Memory of forward and backward over one micro-batch: activations, kept by the trunk; logits,
    what the loss adds; workspace, what the backward pass needs beyond both, and holes on a CPU."""
    batch, meter, marks = collate(documents).to(model.device), Meter(), []
    batch.docs.walk  # noqa: B018  # planned by values, and kept
    with ExitStack() as undo:
        undo.callback(model.train, model.training)
        for param in filter(lambda p: p.requires_grad, model.parameters()):
            hook = param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            undo.callback(hook.remove)
        undo.enter_context(model.trunk.register_forward_hook(lambda *_: marks.append(meter.live)))
        model.train()
        undo.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        undo.enter_context(meter)
        loss_sum, _ = loss(model, batch)
        forward = meter.peak
        loss_sum.backward()
    most = heap_bytes(meter.events) if model.device.type == "cpu" else meter.peak
    return {"activations": marks[0], "logits": forward - marks[0],
            "workspace": max(0, most - forward)}

class Plan:
    """Figures of a run, its model on its device: `shares`, processes that a step is split between;
    `heaviest`, documents of the first micro-batch of a step that has the longest rows; and by
    component `memory_bytes` that a run holds from start to end (also for rows of embeddings that
    the data never read, which need none), and after `count` those that a step adds."""

    def __init__(self, config: Run, model: nn.Module, documents: Sequence[Encoded]) -> None:
        lengths_B, size = lengths(documents), config.optim.batch_size
        steps, rows = config.loop.num_steps(len(lengths_B), config.rows_per_step), len(lengths_B)
        self.work = f"{steps} steps; an epoch is {rows} rows, {lengths_B.sum()} tokens"
        self.more = ""
        is_on_cpu = next(model.parameters()).device.type == "cpu"
        self.shares = min(config.env.threads, size) if is_on_cpu else 1
        longest = np.argsort(-lengths_B, kind="stable")[:size]
        budget = config.loop.micro_batch_tokens
        mine = longest[split(lengths_B[longest], self.shares)[0]]
        self.heaviest = [documents[int(mine[i])] for i in pack(lengths_B[mine], budget)[0]]
        trained = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trained)
        widths = {4} if lengths_B[longest].sum() > budget else {p.element_size() for p in trained}
        self.memory_bytes = {
            "weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
            "masters": 4 * sum(p.numel() for p in trained if p.element_size() < 4),
            "gradients": self.shares * max(widths) * count,
            "moments": 8 * count}

    def count(self, model: Model, loss: Loss) -> None:
        """Add what such micro-batches take, one in each process, and the largest that would fit."""
        model.use_kernels("eager")  # Triton's want values; so a GPU needs less than is said
        fixed, room = sum(self.memory_bytes.values()), free_bytes(model.device)
        room += self.memory_bytes["weights"] if model.device.type == "cpu" else 0
        step = step_bytes(model, loss, self.heaviest)
        self.memory_bytes |= {name: self.shares * size for name, size in step.items()}
        tokens, peak = sum(map(len, self.heaviest)), sum(self.memory_bytes.values())
        many = self.heaviest * -(-LINEAR_TOKENS // tokens)
        per_token = sum(step_bytes(model, loss, many).values()) / sum(map(len, many))
        fits = max(0, int((room - fixed) / self.shares / per_token))
        self.more = (
            f"\npredicted peak with micro-batches of {tokens:,} tokens: {peak / MIB:,.1f} MiB of"
            f" {room / MIB:,.1f}; the largest that fit have {fits:,} tokens")

    def __str__(self) -> str:
        memory = "  ".join(f"{name} {size / MIB:.1f}" for name, size in self.memory_bytes.items())
        return f"{self.work}\nmemory, MiB: {memory}{self.more}"
