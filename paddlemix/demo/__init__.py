"""The data and the report of `paddlemix demo`: drawn scenes, scikit-learn's digits, a tokenizer, a picture.

Everything is made on the spot and written in the user's own JSON-list format, so the demo takes the same path as real
data; nothing is downloaded.  No file here knows the model, the trainer or paddle.
"""
