"""How text is prepared: templates and their rendering, tokenizers, ids and labels; no image is read."""
