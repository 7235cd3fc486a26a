"""Losses, pure: distillation and cross-entropy through the LM heads in chunks, and the budget.

Token losses are means over the counted tokens, in nats. No tensor [tokens, vocabulary] is ever
formed.
"""

from elastic.losses.chunked import Head, top_k_and_text, top_k_of
from elastic.losses.divergences import TopK, distillation_dense, remainder_dense
from elastic.losses.terms import (
    budget_distance,
    check_objective,
    router_terms,
    token_terms,
)

__all__ = [
    "Head",
    "TopK",
    "budget_distance",
    "check_objective",
    "distillation_dense",
    "remainder_dense",
    "router_terms",
    "token_terms",
    "top_k_and_text",
    "top_k_of",
]
