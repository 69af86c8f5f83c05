"""Records of every known form -> Samples, and back."""
