"""Where items come from: each file opens one kind of data as a `Source` (source.py)."""
