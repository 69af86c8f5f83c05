"""What the files of each known layout mean: keys, names of weights, towers, end tokens."""
