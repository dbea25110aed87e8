"""What is done to a whole batch of views at once."""
