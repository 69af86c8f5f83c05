"""Images by path, address or data URI -> RGB, within limits; their sizes and tower features."""
