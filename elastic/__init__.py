"""Many model sizes from one training run of a hybrid Mamba-attention language model."""

from pathlib import Path
from typing import TYPE_CHECKING

from elastic.extract.layerwise.register import register_on_import

if TYPE_CHECKING:
    import torch
    from transformers import NemotronHForCausalLM


def load(
    path: "str | Path",
    budget: str | None = None,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str" = "cpu",
) -> "NemotronHForCausalLM":
    """A member as a transformers model in evaluation mode, on `device`.

    `path` is an elastic checkpoint, of which `budget` names the member, or a directory that
    `extract.py` has written, which holds one. Only the bytes that the member needs are read, and
    every load has memory of its own. `dtype` None keeps the type of every tensor; another never
    rounds A_log, D and dt_bias. A member whose layers of one kind differ in size comes at true
    size, as a subclass of `NemotronHForCausalLM`, and so does one whose parent has a
    `time_step_limit`, which stock transformers does not honour. Step sizes of Mamba layers are
    computed in float32 whatever `dtype` is; stock's plain-torch path rounds them to it.

    Raises:
        ValueError: no such checkpoint, a damaged one, no such budget (those are listed), or a type
            or device that torch does not have here.
    """
    from elastic.extract.loading import load as load_member  # torch only when it is needed

    return load_member(Path(path), budget, dtype, device)


register_on_import()  # AutoModelForCausalLM loads such members too, whenever it is imported

__all__ = ["load"]
