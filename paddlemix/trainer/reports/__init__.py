"""What a run says about itself: at its start, to trackers, about skipped samples, in the model card."""
