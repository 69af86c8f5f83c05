"""Weight files and the tensors in them: safetensors, pickles, directories that appear whole."""
