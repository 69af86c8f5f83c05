"""The data of the published benchmarks: which files a folder must have, and how they become questions."""
