"""Data files as numbered records: indexed, validated, read one at a time."""
