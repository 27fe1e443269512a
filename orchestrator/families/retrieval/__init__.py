"""Retrieval: a network maps an image to one vector; queries search a gallery."""
