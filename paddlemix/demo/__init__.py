"""`paddlemix demo`: its data (drawn scenes, scikit-learn's digits), tokenizer, tiny model, and what it shows.

Everything is made on the spot and written as JSON lists like a user's own, so the demo exercises the same code as real
data; nothing is downloaded.  Only `model.py` and `questioning.py` load paddle.
"""
