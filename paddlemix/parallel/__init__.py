"""Several processes as one run: their layout, what they tell each other, and whole weights out of their shares."""
