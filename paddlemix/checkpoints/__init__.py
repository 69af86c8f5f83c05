"""Directory <-> model and processor: files, names of weights, layouts."""
