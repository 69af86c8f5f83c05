"""Every record and image of data files checked as a run would use it."""
