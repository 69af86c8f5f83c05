"""Names of models -> directories: caches, downloads and the files that a model needs."""
