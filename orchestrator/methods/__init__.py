"""Methods: one file each with ``METHOD``; ``embedding`` and ``asymmetric`` hold what a family shares."""
