"""Answers of the model while it trains: which prompts, and how they are answered."""
