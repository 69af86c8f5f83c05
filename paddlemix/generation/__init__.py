"""Tokens one after the other: sampling, batches, conversations."""
