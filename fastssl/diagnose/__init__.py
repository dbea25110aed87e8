"""What a run will need, what is installed, and what it waits for."""
