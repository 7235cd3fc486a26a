"""Which members there are, what they cost, and where they lie in a tensor. No torch."""
