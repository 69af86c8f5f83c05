"""`paddlemix doctor`: what is installed, which devices there are, what is wrong, and a small test of each device."""
