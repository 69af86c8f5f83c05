"""Benchmarks whose answers a language model judges: what it is asked, what it says, and the score out of that."""
