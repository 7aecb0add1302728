"""AdamW over fp32 masters; gradients of micro-batches and processes are added in fp32.

    m = b1 m + (1 - b1) g            v = b2 v + (1 - b2) g^2
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

A 16-bit tensor is the rounded copy of an fp32 master; a wider one is its own master, unless only
some of its rows are trained. No weight decay on tensors of fewer than two axes; embedding rows not
read stay as they are. A mean of the weights, of decay d, goes max(1 - d, 1 / t) of the way to them.

The rate at step s of S, from 0, w of them warm-up, m the final share of the peak lr:

    warm-up    lr (s + 1) / w                                   s < w
    cosine     lr (m + (1 - m) (1 + cos(pi x)) / 2)             x = (s - w) / (S - w)
    linear     lr (1 - (1 - m) x)
    constant   lr
    wsd        lr until the last d steps; over them as linear   x = (s - (S - d)) / d

source  Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW), 2017, arXiv:1608.03983 (cosine); Hu et
        al. 2024, arXiv:2404.06395 (wsd)"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import accumulate, pairwise
from weakref import WeakMethod
import torch
from torch import Tensor, nn
from ftcore.config import OptimConfig, ScheduleConfig
from ftcore.errors import CheckpointError
from kernels.memory import shared_zeros

Span = tuple[int, int]  # first and past of some values of a flat tensor
Kind = tuple[float, float, bool]  # rate over that of the run; weight decay; only some rows trained
# Values of a flat tensor in one operation: what a core's cache holds between two; a GPU wants many.
PIECES = {"cpu": 2**19, "cuda": 2**26}

def learning_rate(step: int, total_steps: int, peak: float, config: ScheduleConfig) -> float:
    warmup_steps, decay_steps = (int(x * total_steps) for x in (config.warmup, config.decay))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    last = {"constant": 0, "wsd": decay_steps}.get(config.shape, total_steps)
    start = max(warmup_steps, total_steps - last)  # of the decay, over the last steps
    done = min(1.0, max(0, step - start) / max(1, total_steps - start))
    if config.shape != "cosine":
        return peak * (1 - (1 - config.final) * done)
    return peak * (config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2)

class AdamW:
    """The optimiser of one run, of the trained parameters by name: `rates` over that of the run,
    where not 1; `rows`, int64, ascending, of a matrix that alone have a state and a sparse
    gradient; `accumulates`: a process may have several micro-batches a step; if not, gradients keep
    the dtype of the parameters where all have one; those of `rows` are rounded to it.

    Masters and moments (`flats`), 16-bit parameters and the gradients of each process are flat
    tensors, which processes forked later share; `state` and `grads` are views of these by name.
    Parameters of one of the `kinds` lie side by side."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig, *,
                 rates: Mapping[str, float] | None = None, rows: Mapping[str, Tensor] | None = None,
                 accumulates: bool = True) -> None:
        self.config, self.rows, self.step_count = config, rows or {}, 0
        params, self.kinds = {n: p for n, p in named if p.requires_grad}, defaultdict(list)
        for name, param in params.items():
            decay = config.weight_decay if param.dim() >= 2 else 0.0
            self.kinds[(rates or {}).get(name, 1.0), decay, name in self.rows].append(name)
        self.params = {name: params[name] for names in self.kinds.values() for name in names}
        assert self.params, "nothing is trained"
        self.shapes = {n: (len(self.rows.get(n, p)), *p.shape[1:]) for n, p in self.params.items()}
        firsts = [*accumulate(map(math.prod, self.shapes.values()), initial=0)]
        self.zeros = partial(shared_zeros, firsts[-1], device=next(iter(params.values())).device)
        self.spans: dict[str, Span] = dict(zip(self.params, pairwise(firsts), strict=True))
        first, *more = dtypes = {param.dtype for param in self.params.values()}
        self.wide = torch.promote_types(first, torch.float32)
        self.grad_dtype = self.wide if accumulates or more else first
        flats = ("master", "exp_avg", "exp_avg_sq", *["ema"] * (config.ema > 0))
        self.flats = {name: self.zeros(self.wide) for name in flats}
        self.masters = self._named(self.flats["master"])
        narrow = dtypes - {self.wide}
        self.flat_param = self.zeros(*narrow) if narrow else None
        rounded, self.homes = self._named(self.flat_param) if narrow else {}, {}
        self.open_buffers(1)
        collect = WeakMethod(self._collect)  # torch's hooks are in no cycle that Python sees
        for name, param in self.params.items():  # into memory that can be shared
            data, master = param.detach(), self.masters[name]
            master.copy_(data[self.rows[name]] if name in self.rows else data)
            home = self.homes[name] = master if data.dtype == self.wide else rounded[name]
            if name in self.rows:
                home = shared_zeros(data.numel(), data.dtype).view(data.shape)
            param.data = home.copy_(data)
            param.register_post_accumulate_grad_hook(lambda param, n=name: collect()(n, param))

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        return {n: flat[slice(*span)].view(self.shapes[n]) for n, span in self.spans.items()}

    def open_buffers(self, count: int) -> None:
        """Gradients of so many processes; this one has the first."""
        self.buffers = [self.zeros(self.grad_dtype) for _ in range(count)]
        self.collect_in(0)

    def collect_in(self, number: int) -> None:
        self.grads = self._named(self.buffers[number])
        self.stale: set[str] = set()  # of these, what still holds the last step's gradient

    def _collect(self, name: str, param: Tensor) -> None:
        """Move the gradient of a micro-batch into the buffer and free it."""
        total, grad = self.grads[name], param.grad
        assert name in self.stale or total.dtype == self.wide, "a sum would lose bits"
        if grad.is_sparse:
            if name in self.stale:
                total.zero_()
            slots_N = torch.searchsorted(self.rows[name], grad._indices()[0])
            slots_U, of_N = slots_N.unique(return_inverse=True)
            # numerics: a token that is read often has a sum of many gradients
            sums_UC = total.new_zeros(len(slots_U), *total.shape[1:], dtype=self.wide)
            sums_UC.index_add_(0, of_N, grad._values().to(self.wide))
            total.index_add_(0, slots_U, sums_UC.to(total.dtype))
        elif name in self.stale:  # cost: one pass, where zeroing and a mixed sum take four
            total.copy_(grad)
        else:
            total += grad
        self.stale.discard(name)
        param.grad = None

    def zero_grad(self) -> None:
        """Forget the last step's gradients; called once before a step's first micro-batch."""
        self.stale = set(self.grads)

    def zero_unreached(self) -> None:
        """Zeros for the tensors that this step's loss did not reach."""
        while self.stale:
            self.grads[self.stale.pop()].zero_()

    def parts(self, count: int) -> list[Span]:
        """The flat tensors in `count` parts of about equal size, cut between parameters."""
        pasts = [past for _, past in self.spans.values()]
        cuts = [min(pasts, key=lambda p: abs(p - pasts[-1] * i / count)) for i in range(1, count)]
        return list(pairwise([0, *cuts, pasts[-1]]))

    def _work(self, part: Span) -> Iterator[tuple[Kind, list[Span]]]:
        size = PIECES[self.flats["master"].device.type]
        for kind, names in self.kinds.items():
            start = max(part[0], self.spans[names[0]][0])
            past = min(part[1], self.spans[names[-1]][1])
            yield kind, [(first, min(first + size, past)) for first in range(start, past, size)]

    def _gradient(self, piece: Span) -> Tensor:
        """A piece of the gradient of the whole step: the sum over all processes, in their order."""
        first, *others = (buffer[slice(*piece)].to(self.wide) for buffer in self.buffers)
        return sum(others, start=first)  # cost: a sum of two dtypes takes longer

    def square_sums(self, part: Span) -> list[float]:
        """Squared L2 norm of a part of the step's gradient, of each kind."""
        # numerics: a sum adds in pairs; a norm, in few fp32 lanes, loses 0.5 % of 60 M values
        work = ([self._gradient(p).square().sum() for p in ps] for _, ps in self._work(part))
        return [torch.stack(each).double().sum().item() if each else 0.0 for each in work]

    @torch.no_grad()
    def step(self, part: Span, lr: float, grad_scale: float = 1.0) -> None:
        """Apply a part of the step's gradient times `grad_scale` (the clipping factor)."""
        self.step_count += 1
        device, (beta1, beta2) = self.flats["master"].device, self.config.betas
        count = torch.tensor(float(self.step_count), device=device)
        # cost: with None the gradient is not written back
        divisor = None if grad_scale == 1 else torch.tensor(1 / grad_scale, device=device)
        for (ratio, decay, _), pieces in self._work(part):
            for piece in pieces:
                master, exp_avg, exp_avg_sq, *ema = (x[slice(*piece)] for x in self.flats.values())
                torch._fused_adamw_(
                    [master], [self._gradient(piece)], [exp_avg], [exp_avg_sq], [], [count],
                    lr=lr * ratio, beta1=beta1, beta2=beta2, weight_decay=decay,
                    eps=self.config.eps, amsgrad=False, maximize=False, grad_scale=divisor)
                for mean in ema:
                    mean.lerp_(master, max(1 - self.config.ema, 1 / self.step_count))
                if self.flat_param is not None:
                    self.flat_param[slice(*piece)] = master
        self._round_rows(part)

    def swap_ema(self) -> None:
        """Exchange the weights and their mean, where there is one."""
        if self.step_count and "ema" in (state := self.state()):
            for master, mean in zip(state["master"].values(), state["ema"].values(), strict=True):
                mean.copy_((master.clone(), master.copy_(mean))[0])  # the clone is made first
            self.load_state(state, self.step_count)

    def _round_rows(self, part: Span) -> None:
        for name, rows_L in self.rows.items():
            if part[0] <= self.spans[name][0] < part[1]:
                self.params[name].index_copy_(0, rows_L, self.homes[name])

    def first_not_finite(self) -> str | None:
        found = ((name, self._gradient(span).isfinite()) for name, span in self.spans.items())
        return next((name for name, is_finite in found if not is_finite.all()), None)

    def groups(self) -> dict[str, list[str]]:
        return {f"lr_{rate:g}_decay_{decay:g}{'_rows' if has_rows else ''}": names
                for (rate, decay, has_rows), names in self.kinds.items()}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that a resumed run needs: {group: {parameter name: fp32 tensor, or its rows}}."""
        groups = {group: self._named(flat) for group, flat in self.flats.items()}
        return groups | ({"rows": self.rows} if self.rows else {})

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], step_count: int) -> None:
        """Restore `state()` and round the masters into the parameters. Raises CheckpointError, with
        nothing changed: tensors are missing, unknown or mis-shaped, or rows are other ones."""
        for group, tensors in self.state().items():
            saved = {name: tensor.shape for name, tensor in state.get(group, {}).items()}
            wanted = {name: tensor.shape for name, tensor in tensors.items()}
            if odd := sorted(n for n in saved | wanted if saved.get(n) != wanted.get(n)):
                what = f"{len(odd)} tensors of {group} are missing, unknown or mis-shaped"
                raise CheckpointError(f"{what}, such as {odd[0]}: resume with what wrote them")
        if any(not torch.equal(rows_L, state["rows"][n]) for n, rows_L in self.rows.items()):
            raise CheckpointError("the training rows are not those of the checkpoint: restore them")
        self.step_count = step_count
        for group, tensors in self.state().items():
            for name, tensor in tensors.items():
                tensor.copy_(state[group][name])
        if self.flat_param is not None:
            self.flat_param.copy_(self.flats["master"])
        self._round_rows((0, len(self.flats["master"])))
