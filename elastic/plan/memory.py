"""Memory of one device, part by part: what lies there for the whole stage, and what one forward
and backward pass adds.

What each strategy keeps is read off torch's DDP and DeepSpeed 0.19 as `elastic.cluster.strategies`
configures them (ZeRO: arXiv 1910.02054, section 5); what a pass keeps is in `blocks`.
"""

from dataclasses import dataclass

from elastic.config import ObjectiveConfig, ParentShape, RunConfig
from elastic.members.architecture import Architecture, Space
from elastic.members.cost import parameters
from elastic.members.families import nested_families
from elastic.members.search import Search
from elastic.members.targets import smaller_budgets, stand_in_drop_order, targets_of
from elastic.plan.blocks import Block, Execution, blocks_of

BUCKET = 200_000_000
"""`elastic.cluster.strategies.BUCKET`, in elements: ZeRO's buckets."""
SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3 steps at a time, DeepSpeed's default."""
FLATTENED = 500_000_000
"""Elements that ZeRO-1 reduces at a time, DeepSpeed's default."""


@dataclass(frozen=True)
class Static:
    """Bytes on a device for a whole stage."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    buffers: float
    """Buckets of gradients in transit, and weights that ZeRO-3 has gathered."""
    router: float
    step: float
    """More, while the optimizer steps and no activations exist."""

    @property
    def total(self) -> float:
        """Without `step`."""
        parts = (self.weights, self.gradients, self.optimizer, self.teacher, self.buffers)
        return sum(parts) + self.router


@dataclass(frozen=True)
class Pass:
    """Bytes that one forward and backward pass adds."""

    activations: float
    """Kept from the forward to the backward pass."""
    loss: float
    """Beside them, at the loss: logits of a chunk, gradients of the head and of hidden states."""
    moments: dict[str, float]
    """All that exists at its worst moments: in the `teacher`'s pass, at the `loss`, when the
    gradients of the `head` are handed out, and in the backward pass of the largest `block`."""

    @property
    def peak(self) -> float:
        return max(self.moments.values())

    @property
    def worst(self) -> str:
        return max(self.moments, key=lambda name: self.moments[name])


@dataclass(frozen=True)
class Run:
    """One way in which a stage runs the parent."""

    name: str
    architecture: Architecture
    soft: frozenset[str] = frozenset()


def on_gpu(config: RunConfig) -> bool:
    """Whether the plan is one for GPUs; `auto` counts as such."""
    return config.trainer.accelerator != "cpu"


def execution_of(config: RunConfig, length: int, soft: frozenset[str] = frozenset()) -> Execution:
    """How the student runs under a configuration."""
    trainer = config.trainer
    bf16 = trainer.precision != "32-true"
    autocast = trainer.precision == "bf16-mixed" and not trainer.zero_stage
    return Execution(
        kernels="mamba_ssm" if on_gpu(config) and config.parent.kernels != "torch" else "torch",
        stream=4 if autocast or not bf16 else 2,
        compute=2 if bf16 else 4,
        length=length,
        soft=soft,
        autocast=autocast,
    )


def held_parameters(shape: ParentShape) -> int:
    """Weights in memory: a shared head is there once."""
    shared = shape.vocab_size * shape.hidden_size if shape.tied_head else 0
    return parameters(shape, Architecture.full(shape)) - shared


def static_memory(config: RunConfig, shape: ParentShape, router: int) -> Static:
    """What a device holds for a whole stage; `router` is the number of its weights, on every
    device in float32 with gradients and moments.

    float32 masters and moments of AdamW are 12 bytes per weight under ZeRO; DDP and one process
    step the weights as they are.
    """
    trainer = config.trainer
    count, share = float(held_parameters(shape)), trainer.world_size
    stage, size = trainer.zero_stage, 2 if _narrow_weights(config) else 4
    shared, offload = count / share, trainer.offload_optimizer
    table = shape.vocab_size * shape.hidden_size
    bucket = (BUCKET if on_gpu(config) else 1_000_000) * size
    full = Architecture.full(shape)
    blocks = blocks_of(shape, full, execution_of(config, 1)).values()
    step = 0.0
    if stage == 0:
        weights, gradients, optimizer = count * size, count * size, 2 * count * size
        if trainer.precision == "bf16-mixed" and not config.parent.activation_checkpointing:
            weights += 2 * count  # what autocast rounds waits for the backward pass
        buffers = count * size if trainer.strategy == "ddp" else 0.0
    elif stage == 1:
        weights, gradients, optimizer, buffers = count * size, 4 * count, 12 * shared, 0.0
        if size == 2 and not offload:
            gradients += 2 * count  # of the pass at hand, until it is over
        step = 4 * min(count, FLATTENED)
        if offload or size == 4:
            buffers = 4 * bucket / size
    elif stage == 2:
        weights, optimizer = count * size, 12 * shared
        gradients = 4 * shared if size == 2 else 8 * shared
        buffers = (2 if on_gpu(config) else 1) * bucket
    else:
        weights, gradients = shared * size, 4 * shared
        optimizer = 12 * shared
        gathered = 2 * max(block.weights for block in blocks) + 2 * table
        buffers = 2 * bucket + gathered * size
        step = 4 * min(SUB_GROUP, shared)
    if offload:
        optimizer, step = 0.0, 0.0
        gradients = gradients if stage == 1 else 0.0
        buffers += size * table  # on its way to the host
    return Static(
        weights, gradients, optimizer, _teacher(config, shape, blocks),
        buffers, 16.0 * router, step,
    )  # fmt: skip


def _narrow_weights(config: RunConfig) -> bool:
    """Whether the weights that train are bfloat16."""
    trainer = config.trainer
    mixed = trainer.precision == "bf16-mixed" and not trainer.zero_stage
    return trainer.precision != "32-true" and not mixed


def _teacher(config: RunConfig, shape: ParentShape, blocks: object) -> float:
    """The frozen parent on a device: `elastic.teacher`."""
    size = 4 if config.trainer.precision == "32-true" else 2
    count = size * held_parameters(shape)
    kind = config.objective.teacher
    if kind in ("offline", "in_place"):
        return 0.0
    if kind == "replicated":
        return count
    table = shape.vocab_size * shape.hidden_size
    largest = max(block.weights for block in blocks)  # type: ignore[attr-defined]
    places = size * (table + 2 * largest)
    return places + (count / config.trainer.world_size if kind == "zero3" else 0.0)


def router_weights(config: RunConfig, space: Space) -> int:
    """Weights of all routers: two layers per budget that has a choice, and per elastic axis; or
    two layers for all families."""
    hidden = config.router.hidden_units
    if config.members_given:
        return 0
    targets = targets_of(config.budgets, space.shape)
    if config.router.kind == "members":
        order = stand_in_drop_order(space, config.importance)
        search = Search(space, order, config.space.tolerance)
        families = nested_families(search, targets, config.space.nested)
        return 2 * hidden + len(families) * (hidden + 1)
    budgets = len(smaller_budgets(targets))
    outputs = sum(space.decisions(axis) * len(space.choices[axis]) for axis in space.elastic_axes)
    return budgets * (len(space.elastic_axes) * 2 * hidden + outputs * (hidden + 1))


def pass_memory(
    config: RunConfig, shape: ParentShape, run: Run, sequences: int, length: int, teacher: bool
) -> Pass:
    """What one forward and backward pass over `sequences` of `length` tokens adds.

    Without activation checkpointing everything in `blocks` waits; with it the input of every block,
    and one block at a time is run again. `teacher` says whether the frozen parent passes too.
    """
    execution = execution_of(config, length, run.soft)
    tokens, hidden = sequences * length, run.architecture.hidden_size
    blocks = list(blocks_of(shape, run.architecture, execution).values())
    checkpointing = config.parent.activation_checkpointing
    stream, narrow = execution.stream, execution.compute

    def kept(block: Block) -> float:
        if checkpointing:
            return tokens * hidden * stream
        return tokens * block.saved_bytes + block.copied_weights

    once = tokens * 8.0  # token ids
    if "hidden" in run.soft:
        once += tokens * hidden * stream
    last = tokens * (4 * hidden + 4.0)  # the final norm
    below, largest = once, 0.0
    for block in blocks:
        rest = below
        below += kept(block)
        work = block.backward_bytes * tokens + block.weight_gradient
        if checkpointing:
            again = tokens * block.saved_bytes + block.copied_weights
            work = max(work, block.forward_bytes * tokens) + again
            if stream != 4:  # else it is what the norm keeps, and counted there
                rest += tokens * hidden * stream
        else:
            work += kept(block)
        largest = max(largest, rest + work)
    kept_all = below + last
    head = _head(config.objective, shape, execution, tokens, hidden, teacher)
    moments = {"loss": kept_all + head["loss"], "head": kept_all + head["gradients"]}
    moments["block"] = largest
    if teacher:
        teacher_pass = _teacher_pass(config, shape, tokens, length)
        moments["teacher"] = kept_all + narrow * tokens * hidden + teacher_pass
    return Pass(kept_all, head["loss"], moments)


def _head(
    objective: ObjectiveConfig,
    shape: ParentShape,
    execution: Execution,
    tokens: int,
    hidden: int,
    teacher: bool,
) -> dict[str, float]:
    """`elastic.losses.chunked`: a chunk's logits, and the gradients of head and hidden states.

    Buffers of (chunk, v) in float32 hold logits, the student's softmax and the whole distribution
    of a teacher that computes; one in bfloat16 holds what goes through a product.
    """
    narrow, table = execution.compute, shape.vocab_size * hidden
    rows = min(objective.chunk_tokens, tokens) * shape.vocab_size
    both = objective.distillation_weight > 0 and objective.cross_entropy_weight > 0
    buffers = 2 + (teacher and objective.top_k is None) + (both and objective.temperature != 1)
    chunk = rows * (4 * buffers + (narrow if narrow != 4 else 0))
    gradients = 4.0 * (tokens * hidden + table)
    states = tokens * hidden * narrow
    if teacher:
        states += tokens * shape.hidden_size * narrow
    product = table * narrow if narrow != 4 else 0  # of the head's gradient, before it is added
    if execution.autocast:
        product += table * narrow
    handed = narrow * (tokens * hidden + table) if narrow != 4 else 0
    if hidden != shape.hidden_size:
        handed += narrow * shape.vocab_size * shape.hidden_size
    return {"loss": states + chunk + gradients + product, "gradients": gradients + handed}


def _teacher_pass(config: RunConfig, shape: ParentShape, tokens: int, length: int) -> float:
    """The forward pass of the frozen parent: one block at a time, its residual stream in
    float32."""
    student = execution_of(config, length)
    execution = Execution(student.kernels, 4, student.compute, length)
    blocks = blocks_of(shape, Architecture.full(shape), execution).values()
    return tokens * max(block.saved_bytes + block.forward_bytes for block in blocks)


def host_memory(config: RunConfig, shape: ParentShape) -> dict[str, float]:
    """Bytes of host memory per node: while a stage starts, and while it runs.

    Every process reads the whole parent in float32 and copies the teacher before anything is shared
    out.
    """
    trainer = config.trainer
    count, processes = held_parameters(shape), trainer.devices
    size = 4 if trainer.precision == "32-true" else 2
    online = config.objective.teacher not in ("offline", "in_place")
    teacher = size * count if online else 0
    running = teacher if config.objective.teacher == "cpu_offload" else 0.0
    if trainer.offload_optimizer:  # masters, moments, gradients twice, and weights on their way
        running += (20 + (size if trainer.zero_stage < 3 else 0)) * count / trainer.world_size
    return {"start": processes * (4.0 * count + teacher), "run": processes * running}
