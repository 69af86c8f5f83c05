"""How images are prepared: what is declared about them, their tiles, their visual tokens, boxes in them; no model."""
