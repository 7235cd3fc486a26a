"""The configuration of Nemotron-H with sizes per layer."""

from typing import Any

from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig

from elastic.extract.layerwise import MODEL_TYPE


class NemotronHElasticConfig(NemotronHConfig):
    """Nemotron-H with each layer's sizes in `per_layer_config`.

    transformers keeps it: `config.per_layer_config[i]` is a configuration with the sizes of layer
    i, and reading a size that differs between layers from the whole raises. That is why the stock
    model cannot be built from it.
    """

    model_type = MODEL_TYPE

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # The model registers itself with the Auto classes: only when it is needed,
        # and none is needed without such a configuration.
        import elastic.extract.layerwise.model  # noqa: F401
