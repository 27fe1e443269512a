"""Loss terms: tensors in, unweighted scalars out. One file per paper, shared classics beside them."""
