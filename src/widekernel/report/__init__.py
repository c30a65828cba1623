"""Everything that can be known about a network, collected as plain data, and rendered as one HTML page."""
