"""`paddlemix doctor`: what is installed, which devices there are, what is wrong with either, a small test of each."""
