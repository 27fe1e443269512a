"""What a sweep is, what must be prepared for it, one trial of it, and who runs them. Nothing here needs Ray."""
