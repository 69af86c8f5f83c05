"""Answers of the model while it trains: which questions, and how they are answered."""
