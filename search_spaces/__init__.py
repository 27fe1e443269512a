"""Search spaces: plain data, one file = one sweep = one question."""
