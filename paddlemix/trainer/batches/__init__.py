"""Batches on their way to the model: collated, copied to the device, with kept tower features in place of pixels."""
