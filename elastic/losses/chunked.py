"""Token losses from hidden states through the LM heads, without the logits of all tokens at once.

One walk over the tokens, `chunk_tokens` at a time: extra memory is O(chunk x vocabulary) and, while
weights train, the gradient of the LM head in float32.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elastic.config import ConfigError, ObjectiveConfig
from elastic.losses.divergences import CLOSED, TopK

Head = tuple[Tensor, Tensor]
"""Hidden states (tokens, d) and the LM head (v, d) that reads them; d may differ between models."""


def head_loss(
    student: Head, teacher: Head | TopK | None, targets: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the terms that have a weight, differentiable; and each term for the log.

    teacher None leaves out the distillation; its weight must be 0 then. Terms are means over
    tokens, in nats; over no tokens they are 0.
    """
    x, weight = student
    wants = x.requires_grad, weight.requires_grad
    if torch.is_grad_enabled() and any(wants):
        work = _Walk(student, teacher, targets, config, *wants)
        total: Tensor = _HeadLoss.apply(x, weight, work)
        return total, work.terms
    work = _Walk(student, teacher, targets, config, False, False)
    return work.run(), work.terms


def top_k_of(head: Head, k: int, temperature: float, chunk: int) -> TopK:
    """The k most probable next tokens of a teacher's hidden states, `chunk` tokens at a time.

    Raises:
        ConfigError: k is more than the vocabulary.
    """
    targets = torch.zeros(len(head[0]), dtype=torch.int64, device=head[0].device)
    return top_k_and_text(head, targets, k, temperature, chunk)[0]


def top_k_and_text(
    head: Head, targets: Tensor, k: int, temperature: float, chunk: int
) -> tuple[TopK, Tensor]:
    """`top_k_of`, and the log-probability (tokens,) of `targets`, at temperature 1."""
    tokens, (vocabulary, _) = len(head[0]), head[1].shape
    require_top_k(k, vocabulary)
    buffers = _Buffers(min(chunk, tokens), head)
    reader = _Reader(head, buffers)
    text = head[0].new_empty(tokens, dtype=buffers.dtype)
    parts = []
    with torch.no_grad(), torch.autocast(head[0].device.type, enabled=False):
        for rows in _rows(tokens, chunk):
            logits, wanted = reader.logits(rows), targets[rows, None]
            normaliser = _softmax(logits, buffers.get("student", rows))
            text[rows] = (logits.gather(-1, wanted) - normaliser)[:, 0]
            parts.append(_cut(logits, rows, k, temperature, buffers))
    shape = head[0].new_empty((0, k))
    kept = TopK(
        torch.cat([shape.long(), *(part.indices for part in parts)]),
        torch.cat([shape.to(buffers.dtype), *(part.log_probs for part in parts)]),
    )
    return kept, text


def require_top_k(k: int, vocabulary: int) -> None:
    """Raise ConfigError when the vocabulary has fewer tokens."""
    if k > vocabulary:
        raise ConfigError(
            f"objective.top_k={k}: must be at most the parent's vocabulary of {vocabulary}, or null"
        )


class _HeadLoss(torch.autograd.Function):
    """The loss of a walk, whose gradients are made on the way and only scaled in the backward pass.

    Recomputing the logits in the backward pass would cost one more matmul for either head and their
    softmax. Making the gradients at once costs memory that training needs anyway: the head's
    gradient has the size of the head, and that of the hidden states the size of these.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, work: "_Walk") -> Tensor:
        total = work.run()
        ctx.gradients, ctx.dtypes = (work.grad_x, work.grad_weight), (x.dtype, weight.dtype)
        ctx.scale = work.scale
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradients of a loss are handed out once"
        scale = grad_total * ctx.scale
        scaled = (
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None)


class _Buffers:
    """Memory of [chunk, vocabulary], by name: made at first use, used again by every chunk."""

    def __init__(self, rows: int, head: Head) -> None:
        self.shape, self.device = (rows, head[1].shape[0]), head[0].device
        self.dtype = torch.promote_types(head[0].dtype, torch.float32)
        self._made: dict[str, Tensor] = {}

    def get(self, name: str, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, v), of whatever content."""
        if name not in self._made:
            kind = dtype or self.dtype
            self._made[name] = torch.empty(self.shape, dtype=kind, device=self.device)
        return self._made[name][: rows.stop - rows.start]

    def matmul(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Memory for what goes into or comes out of a matmul that is not in the working dtype."""
        return self.get(str(dtype), rows, dtype)


class _Reader:
    """A model's hidden states and head in the dtype of its matmuls: autocast's, or their own."""

    def __init__(self, head: Head, buffers: _Buffers) -> None:
        x, weight = (tensor.detach() for tensor in head)
        kind, self.dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(kind):
            self.dtype = torch.get_autocast_dtype(kind)
        self.x, self.weight, self.buffers = x, weight.to(self.dtype), buffers

    def hidden(self, rows: slice) -> Tensor:
        return self.x[rows].to(self.dtype)

    def logits(self, rows: slice) -> Tensor:
        """(rows, v) in the working dtype, in the buffer `logits`."""
        out = self.buffers.get("logits", rows)
        if self.dtype == out.dtype:
            return torch.mm(self.hidden(rows), self.weight.T, out=out)
        narrow = self.buffers.matmul(rows, self.dtype)
        return out.copy_(torch.mm(self.hidden(rows), self.weight.T, out=narrow))


class _Walk:
    """One walk over the tokens: total, terms and, where wanted, the gradients of the total."""

    def __init__(
        self,
        student: Head,
        teacher: Head | TopK | None,
        targets: Tensor,
        config: ObjectiveConfig,
        wants_x: bool,
        wants_weight: bool,
    ) -> None:
        assert teacher is not None or not config.distillation_weight
        x, weight = student
        self.tokens, self.vocabulary = len(x), len(weight)
        self.targets, self.config = targets[:, None], config
        self.buffers = _Buffers(min(config.chunk_tokens, self.tokens), student)
        self.student = _Reader(student, self.buffers)
        self.kept = teacher if isinstance(teacher, TopK) else None
        self.teacher = None
        if config.distillation_weight and isinstance(teacher, tuple):
            assert len(teacher[1]) == self.vocabulary and len(teacher[0]) == self.tokens
            if config.top_k is not None:
                require_top_k(config.top_k, self.vocabulary)
            self.teacher = _Reader(teacher, self.buffers)
        self.gradient = wants_x or wants_weight
        self.grad_x = self.grad_weight = None
        if wants_x:
            self.grad_x = x.new_empty(x.shape, dtype=self.buffers.dtype)
        if wants_weight:  # a narrowed head has gaps in memory, its gradient none
            self.grad_weight = weight.new_zeros(weight.shape, dtype=self.buffers.dtype)
        weights = {
            "distillation": config.distillation_weight,
            "cross_entropy": config.cross_entropy_weight,
        }
        self.weights = {name: value for name, value in weights.items() if value}
        self.terms = {name: x.new_zeros((), dtype=self.buffers.dtype) for name in self.weights}
        # The softmax of cross-entropy is that of the distillation if both are at one temperature.
        self.shared = len(self.weights) == 2 and config.temperature == 1
        # Gradients are sums of `scale` x (distillation by softened logits + `ratio` x cross-entropy
        # by logits); alone, either of them counts once.
        softened = config.temperature * config.distillation_weight
        self.ratio = config.cross_entropy_weight / softened if softened else 1.0
        self.scale = (softened or config.cross_entropy_weight) / max(self.tokens, 1)

    def run(self) -> Tensor:
        """The total; afterwards `terms` are complete, and `grad_x` and `grad_weight` up to
        `scale`."""
        with torch.no_grad(), torch.autocast(self.buffers.device.type, enabled=False):
            for rows in _rows(self.tokens, self.config.chunk_tokens):
                gradient = self._chunk(rows)
                if self.gradient:
                    self._collect(rows, gradient)
            if "distillation" in self.terms:
                self.terms["distillation"] *= self.config.temperature**2
            total = torch.zeros((), dtype=self.buffers.dtype, device=self.buffers.device)
            for name, term in self.terms.items():
                term /= max(self.tokens, 1)
                total.add_(term, alpha=self.weights[name])
        return total

    def _collect(self, rows: slice, gradient: Tensor) -> None:
        """Carry the gradient of a chunk's logits on to hidden states and head."""
        reader, wide = self.student, self.student.dtype == gradient.dtype
        if not wide:
            gradient = self.buffers.matmul(rows, reader.dtype).copy_(gradient)
        if self.grad_x is not None:
            if wide:
                torch.mm(gradient, reader.weight, out=self.grad_x[rows])
            else:
                self.grad_x[rows] = torch.mm(gradient, reader.weight)
        if self.grad_weight is not None:
            x = reader.hidden(rows)
            if wide:
                self.grad_weight.addmm_(gradient.T, x)
            else:
                self.grad_weight.add_(torch.mm(gradient.T, x))

    def _chunk(self, rows: slice) -> Tensor:
        """Add a chunk to the terms; returns the gradient of its logits, up to `scale`."""
        config, targets = self.config, self.targets[rows]
        distils, reads = "distillation" in self.terms, "cross_entropy" in self.terms
        kept = None if self.kept is None else self.kept.take(rows)
        if self.teacher is not None and config.top_k is not None:
            # before the student's logits, which need the same memory
            kept = _top_k(self.teacher, rows, config.top_k, config.temperature, self.buffers)
        logits, text = self.student.logits(rows), None
        if reads and not self.shared:
            text = self._cross_entropy(logits, targets, rows)
            if not distils:
                return text
        if config.temperature != 1:
            logits.div_(config.temperature)
        if kept is None:
            gradient = self._from_all(logits, targets, rows)
        else:
            gradient = self._from_kept(logits, kept, targets, rows)
        if self.gradient and self.shared:
            gradient.scatter_add_(-1, targets, _constant(targets, -self.ratio, gradient))
        elif self.gradient and text is not None:
            gradient.add_(text, alpha=self.ratio)
        return gradient

    def _cross_entropy(self, logits: Tensor, targets: Tensor, rows: slice) -> Tensor:
        """Cross-entropy by itself; leaves `logits` as they are."""
        q = self.buffers.get("text", rows)
        normaliser = _softmax(logits, q)
        self.terms["cross_entropy"] += (normaliser - logits.gather(-1, targets)).sum()
        return q.scatter_add_(-1, targets, _constant(targets, -1.0, q))

    def _from_all(self, logits: Tensor, targets: Tensor, rows: slice) -> Tensor:
        """Distillation from the teacher's whole distribution, cross-entropy too if shared."""
        assert self.teacher is not None
        log_q = torch.log_softmax(logits, dim=-1, out=self.buffers.get("student", rows))
        if self.shared:
            self.terms["cross_entropy"] -= log_q.gather(-1, targets).sum()
        logits = self.teacher.logits(rows)  # in place of the student's
        if self.config.temperature != 1:
            logits.div_(self.config.temperature)
        log_p = torch.log_softmax(logits, dim=-1, out=self.buffers.get("teacher", rows))
        self.terms["distillation"] += self._divergence(log_q, log_p, logits)
        return log_q

    def _from_kept(self, logits: Tensor, kept: TopK, targets: Tensor, rows: slice) -> Tensor:
        """`_from_all` where the teacher is cut to k tokens and a remainder.

        The remainder is one event with one logit, the logsumexp of its tokens: the divergence is
        over k + 1 logits, and its gradient by the last one is shared among the remainder's tokens
        by their softmax. Nothing is ever the difference of large sums, so that a remainder of
        hardly any mass is as exact as any other.
        """
        shared, k = self.shared, kept.indices.shape[-1]
        wanted = logits.gather(-1, targets)
        events = logits.gather(-1, kept.indices)
        gradient = self.buffers.get("student", rows)
        if k < self.vocabulary:
            logits.scatter_(-1, kept.indices, -math.inf)
            events = torch.cat([events, _softmax(logits, gradient)], dim=-1)
        if shared:
            self.terms["cross_entropy"] += (torch.logsumexp(events, -1, True) - wanted).sum()
        log_q = torch.log_softmax(events, dim=-1)
        log_p = kept.log_events(self.vocabulary, log_q.dtype)
        self.terms["distillation"] += self._divergence(log_q, log_p, torch.empty_like(log_q))
        if self.gradient:
            if k < self.vocabulary:
                gradient.mul_(log_q[:, k:])
            gradient.scatter_(-1, kept.indices, log_q[:, :k])
        return gradient

    def _divergence(self, log_q: Tensor, log_p: Tensor, spare: Tensor) -> Tensor:
        """Sum over tokens; log_q becomes the gradient, the student's share of a shared
        cross-entropy in it."""
        own = self.ratio if self.shared else 0.0
        return CLOSED[self.config.divergence](log_q, log_p, spare, self.gradient, own).sum()


def _rows(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Softmax into `out`; returns the logsumexp (rows, 1), exact at each row's largest logit."""
    torch.softmax(logits, dim=-1, out=out)
    return logits.amax(-1, keepdim=True) - out.amax(-1, keepdim=True).log()


def _constant(indices: Tensor, value: float, like: Tensor) -> Tensor:
    return torch.full_like(indices, value, dtype=like.dtype)


def _top_k(reader: _Reader, rows: slice, k: int, temperature: float, buffers: _Buffers) -> TopK:
    """A teacher's distributions for some tokens, cut to k."""
    return _cut(reader.logits(rows), rows, k, temperature, buffers)


def _cut(logits: Tensor, rows: slice, k: int, temperature: float, buffers: _Buffers) -> TopK:
    """The k most probable tokens at a temperature; overwrites the logits."""
    if temperature != 1:
        logits.div_(temperature)
    log_p = torch.log_softmax(logits, dim=-1, out=buffers.get("student", rows))
    log_probs, indices = torch.topk(log_p, k, dim=-1)
    return TopK(indices, log_probs)
