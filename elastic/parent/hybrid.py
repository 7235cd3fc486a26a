"""The hybrid stack: our own forward of Nemotron-H (arXiv 2508.14444), whole, sliced or masked."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic.config import ParentShape
from elastic.members.architecture import Architecture, Layer
from elastic.members.cut import layer_cut, prefix
from elastic.parent.attend import Seen, one_each, seen_in
from elastic.parent.borders import Borders
from elastic.parent.layers import (
    MLP,
    Attention,
    Cuts,
    Keep,
    LayerKeep,
    Linear,
    narrow,
)
from elastic.parent.norms import ElasticNorm, RMSNorm
from elastic.parent.ssd import MambaMixer

Member = Architecture | Keep | None
"""How to run the parent: sliced to an Architecture, under keep masks, or None for the whole."""

Apart = Mapping[str, Borders | Seen]
"""Kind of block -> document boundaries in its form; empty is one document in every row."""

_KEEP_ALL = LayerKeep()


class Block(nn.Module):
    """One pre-norm residual block: x + gate * mixer(norm(x))."""

    def __init__(self, shape: ParentShape, kind: str, kernels: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(shape.hidden_size, shape.norm_eps)
        self.mixer: nn.Module
        if kind == "mamba":
            self.mixer = MambaMixer(shape, kernels)
        elif kind == "mlp":
            self.mixer = MLP(shape)
        else:
            self.mixer = Attention(shape)

    def forward(
        self,
        x: Tensor,
        layer: Layer | None,
        cuts: Cuts,
        hidden: Tensor | None,
        keep: LayerKeep,
        borders: Borders | Seen = None,
        own: int | None = None,
    ) -> Tensor:
        """(b, t, d) -> (b, t, d); `hidden` (b, d) is the mask of the residual stream, `borders`
        the document boundaries in this kind of mixer's form, `own` as in `ElasticNorm.weights`."""
        normed = self.norm(x, cuts.get("norm.weight"), hidden, own)
        if self.kind == "mlp":
            update = self.mixer(normed, cuts, keep)
        elif self.kind == "attention":
            update = self.mixer(normed, layer, cuts, keep, borders)
        else:
            update = self.mixer(normed, layer, cuts, keep, borders, own)
        if hidden is not None:
            update = update * hidden[:, None, :].to(update.dtype)
        if keep.gate is not None:
            update = update * keep.gate[:, None, None].to(update.dtype)
        return x + update


class Backbone(nn.Module):
    """Embedding, blocks and final norm; the names are those of stored checkpoints."""

    def __init__(self, shape: ParentShape, kernels: str) -> None:
        super().__init__()
        unread = torch.empty(shape.vocab_size, shape.hidden_size)  # not random: see Linear
        self.embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size, _weight=unread)
        self.layers = nn.ModuleList(Block(shape, kind, kernels) for kind in shape.kinds)
        self.norm_f = RMSNorm(shape.hidden_size, shape.norm_eps)


class HybridParent(nn.Module):
    """A Nemotron-H language model that also runs as any of its members.

    `forward` returns the final hidden states, not logits, so that a loss can go through the LM head
    in chunks; `logits` is the plain way.
    """

    def __init__(
        self, shape: ParentShape, kernels: str = "torch", activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.shape = shape
        self.activation_checkpointing = activation_checkpointing
        self.backbone = Backbone(shape, kernels)
        self.lm_head = Linear(shape.hidden_size, shape.vocab_size)
        if shape.tied_head:
            self.lm_head.weight = self.backbone.embeddings.weight
        self._cuts: dict[Architecture, list[tuple[Layer, Cuts]]] = {}

    def add_own_norms(self, budgets: int, energies: Mapping[str, Tensor]) -> None:
        """Give each of some budgets norm weights of its own; a second time they start anew.

        energies: norm's stored name -> (size,) float32, shares of the channels in the energy of its
        inputs, within each SSM group for a gated norm.
        """
        for name, module in self.named_modules():
            if isinstance(module, ElasticNorm):
                module.add_own(budgets, energies[f"{name}.weight"])

    def forward(
        self,
        tokens: Tensor,
        member: Member = None,
        documents: Tensor | None = None,
        own: int | None = None,
    ) -> Tensor:
        """(b, t) int64 -> (b, t, d) hidden states after the final norm; d is the member's width.

        `own` is the position of a budget whose own norm weights count (`add_own_norms`).

        `documents` (b, t) int32 are ids that never fall along a sequence. Nothing crosses from one
        document to the next: neither state nor convolution nor attention. None is one document.
        """
        borders = self.borders(documents)
        if isinstance(member, Architecture):
            return self._run_sliced(tokens, member, borders, own)
        hidden = None if member is None else member.hidden
        x = F.embedding(tokens, self.backbone.embeddings.weight)  # (b, t, d)
        if hidden is not None:
            x = x * hidden[:, None, :].to(x.dtype)
        for index, block in enumerate(self.backbone.layers):
            keep = _KEEP_ALL if member is None else member.layers[index]
            x = self._block(block, x, None, {}, hidden, keep, borders, own)
        return self.backbone.norm_f(x, None, hidden, own)

    def _run_sliced(
        self, tokens: Tensor, member: Architecture, borders: Apart, own: int | None
    ) -> Tensor:
        """No masked channel is multiplied and no dropped layer runs."""
        layers = self._layers_of(member)
        hidden = (prefix(member.hidden_size, self.shape.hidden_size),)
        x = F.embedding(tokens, narrow(self.backbone.embeddings.weight, (None, *hidden)))
        for layer, cuts in layers:
            block = self.backbone.layers[layer.index]
            x = self._block(block, x, layer, cuts, None, _KEEP_ALL, borders, own)
        return self.backbone.norm_f(x, hidden, None, own)

    def _layers_of(self, member: Architecture) -> list[tuple[Layer, Cuts]]:
        """A member's layers and cuts, worked out once."""
        if member not in self._cuts:
            member.check(self.shape)
            self._cuts[member] = [
                (layer, layer_cut(self.shape, member.hidden_size, layer)) for layer in member.layers
            ]
        return self._cuts[member]

    def _block(
        self,
        block: nn.Module,
        x: Tensor,
        layer: Layer | None,
        cuts: Cuts,
        hidden: Tensor | None,
        keep: LayerKeep,
        borders: Apart,
        own: int | None,
    ) -> Tensor:
        assert isinstance(block, Block)
        inputs = (x, layer, cuts, hidden, keep, borders.get(block.kind), own)
        if self.activation_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return out
        return block(*inputs)

    def borders(self, documents: Tensor | None) -> Apart:
        """Document boundaries in each kind of block's form, made once for all blocks."""
        if documents is None or one_each(documents):
            return {}
        apart: dict[str, Borders | Seen] = {"mamba": Borders(documents, self.shape.conv_kernel)}
        if "attention" in self.shape.kinds:
            apart["attention"] = seen_in(documents, self.shape.head_dim)
        return apart

    def head_weight(self, member: Member = None) -> Tensor:
        """LM head of a member: (v, d)."""
        if not isinstance(member, Architecture):
            return self.lm_head.weight
        cut = (None, prefix(member.hidden_size, self.shape.hidden_size))
        return narrow(self.lm_head.weight, cut)

    def logits(
        self,
        tokens: Tensor,
        member: Member = None,
        documents: Tensor | None = None,
        own: int | None = None,
    ) -> Tensor:
        """(b, t) int64 -> (b, t, v) float32; arguments as in `forward`."""
        return F.linear(self(tokens, member, documents, own), self.head_weight(member)).float()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> "HybridParent":
        """Random start: normal(0, 0.02), outputs into the residual stream scaled by 1/sqrt(layers),
        step sizes log-uniform in [0.001, 0.1] and decays -1..-16 (arXiv 2405.21060)."""
        scale = 1 / math.sqrt(len(self.shape.pattern))
        for name, weight in self.named_parameters():
            last = name.rsplit(".", 1)[-1] if "proj" not in name else name.split(".")[-2]
            if name.endswith("A_log"):
                weight.copy_(torch.linspace(1, 16, weight.numel()).log())
            elif name.endswith("dt_bias"):
                uniform = torch.rand(weight.shape, generator=generator)
                dt = torch.exp(uniform * (math.log(0.1) - math.log(1e-3)) + math.log(1e-3))
                weight.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
            elif name.endswith(".D") or "norm" in name:
                weight.fill_(1.0)
            elif "conv1d" in name:
                bound = 1 / math.sqrt(self.shape.conv_kernel)
                weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * bound)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
                if last in ("out_proj", "o_proj", "down_proj"):
                    weight.mul_(scale)
        return self
