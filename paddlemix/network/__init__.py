"""Files of other machines: addresses that may be asked, connections that end, downloads that are kept; no paddle."""
