"""Data sets: one file each with a function ``load(data_root, evaluate_on)``, and what they share."""
