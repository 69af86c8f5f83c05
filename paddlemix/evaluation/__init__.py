"""How good answers are: metrics over texts."""
