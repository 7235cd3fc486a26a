"""Divergences of a student's next-token distribution from its teacher's: plain, and closed forms.

p is the teacher's distribution and q the student's, over events: every token of the vocabulary, or
the teacher's top k tokens and one remainder for all others. Everything is in nats.

The plain functions are the specification: autograd differentiates them, on logits that exist whole.
The closed forms, named with torch's trailing underscore, work in the memory of their arguments and
compute their own gradient; tests compare the two.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher's distribution for each token, cut to its k most probable continuations.

    Attributes:
        indices: (tokens, k) int64, k different entries of the vocabulary.
        log_probs: (tokens, k), at the temperature of the objective.
    """

    indices: Tensor
    log_probs: Tensor

    def take(self, tokens: slice | Tensor) -> "TopK":
        """The same for some of the tokens."""
        return TopK(self.indices[tokens], self.log_probs[tokens])

    def log_events(self, vocabulary: int, dtype: torch.dtype) -> Tensor:
        """Log-probabilities of the top k tokens and of the remainder, (tokens, k + 1).

        With k the whole vocabulary there is no remainder: (tokens, k). The remainder's mass is
        known to the rounding of the other tokens' sum, so that it never counts as less than that;
        and cached values are rounded, so that the result is normalised again.
        """
        log_p = self.log_probs.to(dtype)
        if self.indices.shape[-1] < vocabulary:
            named = torch.logsumexp(log_p, dim=-1, keepdim=True)
            named = named.clamp(max=-torch.finfo(dtype).eps)
            log_p = torch.cat([log_p, torch.log(-torch.expm1(named))], dim=-1)
        return torch.log_softmax(log_p, dim=-1)


# Plain: log q and log p (tokens, events) -> (tokens,)


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q): mean-seeking: the student covers all that the teacher finds probable."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p): mode-seeking: the student avoids what the teacher finds improbable."""
    return forward_kl(log_p, log_q)


def jsd(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Jensen-Shannon divergence: mean KL of p and of q to their mean, at most log 2."""
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)
    return (forward_kl(log_m, log_p) + forward_kl(log_m, log_q)) / 2


PLAIN = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd}


def distillation_dense(
    student: Tensor, teacher: Tensor, divergence: str, temperature: float
) -> Tensor:
    """Divergence of logits (tokens, v), times temperature^2, mean over tokens.

    The squared temperature keeps the gradient's size (arXiv 1503.02531, section 2.1).
    """
    log_q, log_p = (torch.log_softmax(_wide(x) / temperature, dim=-1) for x in (student, teacher))
    return PLAIN[divergence](log_q, log_p).mean() * temperature**2


def remainder_dense(student: Tensor, teacher: TopK, divergence: str, temperature: float) -> Tensor:
    """`distillation_dense` over k + 1 events: the k tokens and the remainder."""
    log_q = torch.log_softmax(_wide(student) / temperature, dim=-1)
    events = log_q.gather(-1, teacher.indices)
    if events.shape != log_q.shape:
        others = log_q.scatter(-1, teacher.indices, -math.inf)
        events = torch.cat([events, torch.logsumexp(others, dim=-1, keepdim=True)], dim=-1)
    log_p = teacher.log_events(student.shape[-1], log_q.dtype)
    return PLAIN[divergence](events, log_p).mean() * temperature**2


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# Closed forms. Arguments: log q, log p and spare memory, each (tokens, events), each overwritten.
# Returned: the divergence of each token, (tokens,). With `gradient`, log q is left as derivative
# by the student's logits (before the softmax, after the temperature) plus `own` x q, which is where
# cross-entropy joins in without a pass of its own.


def forward_kl_(
    log_q: Tensor, log_p: Tensor, spare: Tensor, gradient: bool, own: float = 0.0
) -> Tensor:
    """Gradient: q - p."""
    p = torch.exp(log_p, out=spare)
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    if gradient:
        q = log_q.exp_()
        if own:
            q.mul_(1 + own)
        q.sub_(p)
    return value


def reverse_kl_(
    log_q: Tensor, log_p: Tensor, spare: Tensor, gradient: bool, own: float = 0.0
) -> Tensor:
    """Gradient: q (log q - log p - KL(q || p))."""
    q = torch.exp(log_q, out=spare)
    terms = log_q.sub_(log_p).mul_(q)
    value = terms.sum(-1)
    if gradient:
        terms.addcmul_(q, (own - value)[:, None])
    return value


def jsd_(log_q: Tensor, log_p: Tensor, spare: Tensor, gradient: bool, own: float = 0.0) -> Tensor:
    """Gradient: q (log q - log m - KL(q || m)) / 2, m the mean of p and q.

    p / m and q / m are at most 2, so that nothing overflows; where both underflow, they count as
    zero.
    """
    p, q = log_p.exp_(), log_q.exp_()
    mean = torch.lerp(p, q, 0.5, out=spare).clamp_min_(torch.finfo(spare.dtype).tiny)
    ratio = p.div_(mean)
    of_teacher = torch.special.entr(ratio, out=p).mul_(mean).sum(-1)  # entr(x) = -x log x
    ratio = q.div_(mean)
    terms = torch.special.entr(ratio, out=p).mul_(mean)
    of_student = terms.sum(-1)
    if gradient:
        q.mul_(mean).mul_((of_student / 2 + own)[:, None]).sub_(terms, alpha=0.5)
    return (of_teacher + of_student) / -2


CLOSED = {"forward_kl": forward_kl_, "reverse_kl": reverse_kl_, "jsd": jsd_}
