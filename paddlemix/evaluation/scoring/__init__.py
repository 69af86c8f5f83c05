"""The metrics of the field, each as its official scorer computes it: plain Python on texts."""
