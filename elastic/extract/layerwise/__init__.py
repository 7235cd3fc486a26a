"""Nemotron-H whose layers differ in size, as a transformers model: for members that no stock
checkpoint can hold at their true size.

`register` registers it with AutoConfig and AutoModelForCausalLM and imports neither torch nor
transformers for that; `config` and `model` are the two classes, `sizes` is their config.json.
"""

MODEL_TYPE = "nemotron_h_elastic"
"""Not stock's, so that software without this model refuses it instead of building another."""

ARCHITECTURE = "NemotronHElasticForCausalLM"
"""Its class."""
