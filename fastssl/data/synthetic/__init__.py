"""Labeled data from formulas: images, clips, volumes, signals, clouds of points."""
