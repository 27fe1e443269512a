"""Protocols: embeddings in, numbers out. Leaves: they import nothing else of the orchestrator."""
