"""Similarities of all pairs, streamed over tiles: log-sum-exp, sigmoid, top n, masks."""
