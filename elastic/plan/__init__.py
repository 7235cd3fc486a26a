"""What a run will do and whether it fits, worked out from its settings: no weights, no GPU, no
torch."""
