"""Networks: images in, embeddings out."""
