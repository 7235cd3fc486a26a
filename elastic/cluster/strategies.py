"""How Lightning runs the processes: one, DDP, or DeepSpeed's ZeRO (arXiv 1910.02054)."""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor

from elastic.cluster.place import Place, PlaceEnvironment
from elastic.config import ConfigError, OptimConfig, TrainerConfig

BUCKET = 200_000_000
"""Elements per reduction and gathering of ZeRO."""


def check_zero(trainer: TrainerConfig, device: torch.device) -> None:
    """Stop what DeepSpeed cannot do.

    Raises:
        ConfigError: it is not installed, or there is no GPU and CPUs were not asked for.
    """
    if not trainer.zero_stage:
        return
    key = f"trainer.strategy={trainer.strategy}"
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"{key}: deepspeed is not installed; pip install deepspeed, or trainer.strategy=ddp"
        )
    if device.type != "cuda" and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise ConfigError(
            f"{key}: DeepSpeed needs GPUs; set trainer.accelerator=gpu, or trainer.strategy=ddp "
            "(DS_ACCELERATOR=cpu in the environment tries it on CPUs, for tests)"
        )


def build_strategy(
    trainer: TrainerConfig,
    optim: OptimConfig,
    place: Place,
    device: torch.device,
    leaves_out: bool,
) -> Strategy:
    """The strategy of one fit, in which passes leave weights out or do not; the process group must
    exist."""
    if trainer.strategy == "single":
        return SingleDeviceStrategy(device)
    environment = PlaceEnvironment(place)
    if trainer.strategy == "ddp":
        return DDPStrategy(
            cluster_environment=environment,
            process_group_backend="nccl" if device.type == "cuda" else "gloo",
            find_unused_parameters=leaves_out,
        )
    return ZeroStrategy(trainer, optim, environment, device)


class ZeroPrecision(DeepSpeedPrecision):
    """Scales the loss once, and steps where a step ends.

    Lightning divides the loss by the number of accumulated passes, and so would the engine.
    """

    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        engine: Any = model.trainer.model
        engine.backward(tensor, scale_wrt_gas=False)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        result = closure()
        self._after_closure(model, optimizer)
        engine: Any = model.trainer.model
        strategy = model.trainer.strategy
        assert isinstance(strategy, ZeroStrategy)
        if strategy.managed or model.between_steps:
            engine.step()
        if model.between_steps:
            strategy.forget_gradients()
        return result


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO, on GPUs or, for tests, on CPU processes with gloo."""

    def __init__(
        self,
        trainer: TrainerConfig,
        optim: OptimConfig,
        environment: PlaceEnvironment,
        device: torch.device,
    ) -> None:
        on_gpu = device.type == "cuda"
        self.stage, self.on_gpu = trainer.zero_stage, on_gpu
        # With the optimizer in host memory the engine carries gradients there in the last pass of a
        # step only; weights that this pass leaves out would lose theirs, unless the caller says
        # when a step ends.
        self.managed = not trainer.offload_optimizer
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": on_gpu and (self.managed or self.stage == 2),
            "reduce_bucket_size": BUCKET if on_gpu else 1_000_000,
            "allgather_bucket_size": BUCKET if on_gpu else 1_000_000,
        }
        if trainer.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if self.stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        config: dict[str, Any] = {
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": optim.gradient_clip,
            "managed_gradient_accumulation": self.managed,
            "train_micro_batch_size_per_gpu": 1,  # it cannot be read off our batches; a log's unit
        }
        if trainer.precision != "32-true":
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        super().__init__(
            config=config,
            cluster_environment=environment,
            precision_plugin=ZeroPrecision(trainer.precision),  # type: ignore[arg-type]
            process_group_backend="nccl" if on_gpu else "gloo",
            logging_level=logging.WARNING,
        )

    @property
    def root_device(self) -> torch.device:
        return super().root_device if self.on_gpu else torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """Lightning's, without its refusal of CPUs."""
        if self.on_gpu:
            assert isinstance(self.accelerator, CUDAAccelerator)
            return super().setup_environment()
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Lightning's, without its look at the indices of GPUs."""
        self.set_world_ranks()
        if not self.on_gpu:
            import deepspeed

            # It would compile an extension for shared memory first; gloo is all that is needed.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._init_deepspeed_distributed()

    def init_deepspeed(self) -> None:
        """Gather the weights of a block together: it reads those of its parts itself."""
        if self.stage == 3:
            from deepspeed.utils import set_z3_leaf_modules

            assert self.lightning_module is not None
            set_z3_leaf_modules(self.lightning_module, self.lightning_module.leaf_classes)
        super().init_deepspeed()

    @property
    def overflow(self) -> bool:
        """Whether the last step was left out because its gradient was not finite."""
        optimizer: Any = self.optimizers[0]
        return bool(optimizer.overflow)

    @property
    def gradient_norm(self) -> Tensor | float:
        """Of the last step, over all processes, before clipping."""
        optimizer: Any = self.optimizers[0]
        norm: Tensor | float = optimizer._global_grad_norm
        return norm

    def forget_gradients(self) -> None:
        """Zero what the engine keeps of gradients.

        A weight that no pass of a step uses has no gradient; ZeRO-3, and any stage with the
        optimizer in host memory, would take the one of an earlier step for it. And one that the
        first pass leaves out, as the full member does with the norms of others, would have the
        gradient of the step before added to its own.
        """
        optimizer: Any = self.optimizers[0]
        if self.stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
            masters = optimizer.fp32_partitioned_groups_flat
        else:
            masters = optimizer.single_partition_of_fp32_groups
            for summed in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
                summed.zero_()
        for master in masters:
            if master.grad is not None:
                master.grad.zero_()
