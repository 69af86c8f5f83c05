"""What runs between the steps of a run: progress, meters, samples, and reasons to stop."""
