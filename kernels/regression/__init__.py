"""Errors of predicted latents and points."""
