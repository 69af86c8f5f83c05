"""Sample -> Example: text, templates and images, in numpy and PIL alone."""
