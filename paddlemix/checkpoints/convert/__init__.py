"""A checkpoint or adapter written in another layout, and read back."""
