"""Losses, pure: distillation and cross-entropy through the LM heads in chunks, and the budget.

Token losses are means over the counted tokens, in nats. No tensor [tokens, vocabulary] is ever
formed.
"""

from elastic.losses.chunked import Head, top_k_and_text, top_k_of
from elastic.losses.divergences import TopK, distillation_dense, remainder_dense
from elastic.losses.terms import (
    check_objective,
    next_multiplier,
    router_terms,
    token_terms,
)

__all__ = [
    "Head",
    "TopK",
    "check_objective",
    "distillation_dense",
    "next_multiplier",
    "remainder_dense",
    "router_terms",
    "token_terms",
    "top_k_and_text",
    "top_k_of",
]
