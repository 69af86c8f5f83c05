"""One JSON file -> one checked `RunConfig`, and the recipes that ship with the package."""
