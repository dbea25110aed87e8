"""A pretraining run: the loop, its directory and logs, and what it is judged by."""
