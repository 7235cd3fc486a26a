"""Nemotron-H with sizes per layer: stock blocks, each built from its own layer's configuration."""

from typing import Any

from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    NemotronHForCausalLM,
    NemotronHModel,
    NemotronHPreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHBlock,
    NemotronHMamba2Mixer,
    NemotronHRMSNorm,
)

from elastic.extract.layerwise import MODEL_TYPE
from elastic.extract.layerwise.config import NemotronHElasticConfig
from elastic.extract.layerwise.mixer import adopt_mixers


class _PerLayer(NemotronHPreTrainedModel):
    """What both classes below change in their stock bases."""

    config: NemotronHElasticConfig
    config_class = NemotronHElasticConfig

    def _init_weights(self, module: nn.Module) -> None:
        """Stock reads the size of a mixer from the model's configuration."""
        if not isinstance(module, NemotronHMamba2Mixer):
            super()._init_weights(module)
            return
        whole = self.config
        self.config = module.config  # type: ignore[assignment]  # a layer's, of the same class
        try:
            super()._init_weights(module)
        finally:
            self.config = whole


class NemotronHElasticModel(_PerLayer, NemotronHModel):
    """The stack: embedding, blocks of different sizes, final norm."""

    def __init__(self, config: NemotronHElasticConfig) -> None:
        # Past the constructor of NemotronHModel, which would build blocks of one size.
        super(NemotronHModel, self).__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            NemotronHBlock(layer, layer_idx=index)
            for index, layer in enumerate(config.per_layer_config)
        )
        for block in self.layers:
            if isinstance(block.mixer, NemotronHAttention):
                # A layer's configuration is a copy; which kernel attends is set on the whole.
                block.mixer.config = config
        adopt_mixers(self)
        self.norm_f = NemotronHRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.post_init()


class NemotronHElasticForCausalLM(_PerLayer, NemotronHForCausalLM):
    """A `NemotronHForCausalLM` whose layers have sizes of their own.

    Forward, generation and caches are stock, but for the step sizes of Mamba layers (`mixer`):
    every block's state has its block's sizes.
    """

    def __init__(self, config: NemotronHElasticConfig) -> None:
        # Past the constructor of NemotronHForCausalLM, for the same reason.
        super(NemotronHForCausalLM, self).__init__(config)
        self.model = NemotronHElasticModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _register() -> None:
    """Checkpoints call the stack `backbone`, as stock Nemotron-H ones do."""
    names: list[Any] = [WeightRenaming("backbone.", "model.")]
    register_checkpoint_conversion_mapping(MODEL_TYPE, names, overwrite=True)
    AutoModel.register(NemotronHElasticConfig, NemotronHElasticModel, exist_ok=True)
    AutoModelForCausalLM.register(
        NemotronHElasticConfig, NemotronHElasticForCausalLM, exist_ok=True
    )


_register()
