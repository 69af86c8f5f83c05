"""One thin file per command: read arguments, call the room that does the work, say what came out."""
