"""Tokens in and out of masked sequences, and their attention bias."""
