"""What weights and declared files hold, as digests that do not depend on the layout."""
