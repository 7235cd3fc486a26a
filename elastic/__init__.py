"""Many model sizes from one training run of a hybrid Mamba-attention language model."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import NemotronHForCausalLM


def load(
    path: "str | Path",
    budget: str,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str" = "cpu",
) -> "NemotronHForCausalLM":
    """One member of the elastic checkpoint in directory `path`, as a stock transformers model.

    Only the bytes that the member needs are read. `dtype` None keeps the type of every tensor.

    Raises:
        ValueError: not an elastic checkpoint, a damaged one, or no such budget (those are listed).
    """
    from elastic.extract import load as load_member  # torch only when it is needed

    return load_member(Path(path), budget, dtype, device)


__all__ = ["load"]
