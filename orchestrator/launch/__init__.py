"""What a sweep is, and its trials, without Ray: names of today's place until it is written."""
