"""The basis of the residual stream: principal directions of what its norms hand on, largest first.

An RMS norm without weights commutes with every orthogonal matrix Q: once its weights are folded
into the projections that read it, the stream can be rotated and the network computes what it
computed (arXiv 2401.15024 rotates block by block; one Q for all blocks needs no adapters, so that
the result is an ordinary checkpoint). Coordinates of a trained stream carry nearly equal energy;
its principal directions do not, so that a prefix of them is a far better narrow member than the
best coordinates. Shapes: d hidden, n norms.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from elastic.cluster.place import ALONE, Place, add_up, from_first
from elastic.config import ParentShape
from elastic.importance.passes import gram
from elastic.parent import HybridParent

FINAL = "backbone.norm_f.weight"

ORTHOGONAL = 1e-6
"""Largest entry of Q^T Q - 1 that counts as rounding; Q is computed in float64."""


def stream_norms(shape: ParentShape) -> list[str]:
    """Stored names of the norms that read the residual stream, in the network's order."""
    return [f"backbone.layers.{i}.norm.weight" for i in range(len(shape.kinds))] + [FINAL]


def gated_norms(shape: ParentShape) -> list[str]:
    """Stored names of the Mamba layers' gated norms, in the network's order."""
    mamba = (i for i, kind in enumerate(shape.kinds) if kind == "mamba")
    return [f"backbone.layers.{i}.mixer.norm.weight" for i in mamba]


READERS = {
    "mamba": ("in_proj.weight",),
    "mlp": ("up_proj.weight",),
    "attention": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
}
"""Projections that read the norm of a kind of block."""


def readers(shape: ParentShape, norm: str) -> list[str]:
    """Stored names of the projections that read a norm of the stream."""
    if norm == FINAL:
        return ["lm_head.weight"]
    prefix = norm.removesuffix("norm.weight")
    return [f"{prefix}mixer.{name}" for name in READERS[shape.kinds[int(prefix.split(".")[2])]]]


@torch.no_grad()
def principal_directions(
    parent: HybridParent, covariances: Mapping[str, Tensor], place: Place = ALONE
) -> Tensor:
    """Q (d, d) float64 on the CPU: column j is the j-th direction, the most important first; the
    same on every process.

    For one norm with covariance C of its normalised inputs and readers W (norm weights folded in),
    C^1/2 W^T W C^1/2 has the energy that the readers receive along each direction. The matrices of
    all norms are summed, each as a share of its trace, so that each norm counts alike; Q are the
    eigenvectors of the sum. Zero-shot this loses 14 to 34% less at half to seven eighths of the
    width than eigenvectors of the summed covariances (docs/log.md, 2026-11-29).

    Args:
        covariances: norm's stored name -> (d, d) float64, of this process' share of the norms.
    """
    weights = dict(parent.named_parameters())
    width, device = parent.shape.hidden_size, parent.lm_head.weight.device
    total = torch.zeros(width, width, dtype=torch.float64, device=device)
    for norm, covariance in covariances.items():
        gain = weights[norm].detach().to(covariance)
        read = torch.zeros_like(covariance)
        for name in readers(parent.shape, norm):
            read += gram(weights[name])
        read *= gain[:, None] * gain
        root = _root(covariance)
        energy = root @ read @ root
        trace = energy.trace()
        if trace > 0:  # a block that reads nothing has no wish
            total += energy / trace
    add_up(total)
    # Two processes need not turn equal eigenvalues alike.
    return from_first(directions_of(total) if place.rank == 0 else None)


def directions_of(energy: Tensor) -> Tensor:
    """Eigenvectors of a symmetric (d, d) float64, largest eigenvalue first, as columns; on the CPU.

    The sign of an eigenvector is free: the largest entry of each is made positive, so that a run is
    repeatable wherever the values are.
    """
    vectors = torch.linalg.eigh((energy + energy.T) / 2).eigenvectors.flip(1)
    largest = vectors.abs().argmax(0)
    signs = vectors.gather(0, largest[None]).sign()
    return (vectors * signs).cpu()


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric matrix that has no negative eigenvalue but by rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def spread(rotation: Tensor, widths: Sequence[int], generator: torch.Generator) -> Tensor:
    """Q with a random orthogonal matrix inside each segment between neighbouring widths.

    The first k directions span what they spanned, for every k of `widths`; inside a segment all
    carry about the same energy.
    """
    out = rotation.clone()
    start = 0
    for stop in sorted({*widths, rotation.shape[1]}):
        size = stop - start
        if size > 0:
            drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
            out[:, start:stop] = rotation[:, start:stop] @ torch.linalg.qr(drawn).Q
        start = stop
    return out


def check_rotation(rotation: Tensor) -> None:
    """Assert that a rotation is orthogonal: it would change the function otherwise."""
    product = rotation.double().T @ rotation.double()
    product.diagonal().sub_(1.0)
    worst = float(product.abs().max())
    assert worst < ORTHOGONAL, f"the rotation is not orthogonal: Q^T Q - 1 is up to {worst:.1e}"


def energies(covariances: Mapping[str, Tensor], rotation: Tensor | None) -> dict[str, Tensor]:
    """Share of each channel in a norm's input energy, in the rotated basis: name -> (d,) float32.

    The mean over tokens of x_j^2 / sum(x^2); without a rotation in the coordinates as found, for
    which diagonals (d,) are enough.
    """
    found = {}
    for norm, covariance in covariances.items():
        if rotation is None:
            energy = covariance if covariance.ndim == 1 else covariance.diagonal()
        else:
            turn = rotation.to(covariance.device)
            energy = ((covariance @ turn) * turn).sum(0)
        found[norm] = (energy / energy.sum()).float().cpu()
    return found


def energy_shares(
    energy: Mapping[str, Tensor], found: Tensor, widths: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Mean share of energy that a width keeps: in the basis, and in as many best coordinates.

    Args:
        energy: of every norm of the stream, in the basis: (d,) that sum to 1.
        found: (d,) mean over the norms, in the coordinates as found.
        widths: the choices of the hidden axis.
    """
    basis = torch.stack(list(energy.values())).double().mean(0)
    best = found.double().sort(descending=True).values
    return {
        str(width): {
            "basis": round(float(basis[:width].sum()), 6),
            "coordinates": round(float(best[:width].sum() / best.sum()), 6),
        }
        for width in widths
    }


class StreamStatistic:
    """Covariance of a norm's normalised inputs, (d, d) float64, summed over all tokens; without
    `covariance` its diagonal alone, (d,)."""

    def __init__(self, norm: nn.Module, covariance: bool) -> None:
        self.eps, self.covariance = float(norm.eps), covariance  # type: ignore[arg-type]
        weight = norm.weight
        assert isinstance(weight, Tensor)
        size = (len(weight),) * (2 if covariance else 1)
        self.total = torch.zeros(size, dtype=torch.float64, device=weight.device)

    def add(self, x: Tensor) -> None:
        """(b, t, d): inputs of the norm. Products in float32 on a GPU, whose sums are float64."""
        flat = x.detach().flatten(0, 1).float()
        flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.eps)
        if not flat.is_cuda:
            flat = flat.double()
        self.total += flat.T @ flat if self.covariance else flat.square().sum(0)

    def share(self) -> None:
        """Have what all processes have seen."""
        add_up(self.total)

    @property
    def value(self) -> Tensor:
        return self.total


class GatedStatistic:
    """Share of each unit in the input energy of a gated norm's group, (units,) float32."""

    def __init__(self, norm: nn.Module, groups: int) -> None:
        self.groups = groups
        weight = norm.weight
        assert isinstance(weight, Tensor)
        self.total = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=weight.device)

    def add(self, gated: Tensor) -> None:
        """(b, t, units): inputs of the norm, gate applied."""
        power = gated.detach().float().square().unflatten(-1, (self.groups, -1))
        share = power / power.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        self.total += share.double().sum((0, 1)).flatten()
        self.tokens += math.prod(gated.shape[:2])

    def share(self) -> None:
        """Have what all processes have seen."""
        add_up(self.total)
        add_up(self.tokens)

    @property
    def value(self) -> Tensor:
        return (self.total / self.tokens).float().cpu()
