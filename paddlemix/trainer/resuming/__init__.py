"""Checkpoints of a run: written, checked, and compared with the run that resumes from them."""
