"""Other programs' keys, flags and templates, each with ours."""
