"""What all families share: the choice of an implementation, checks, chunks, tuning, launches."""
