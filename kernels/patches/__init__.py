"""Patches straight from pixels."""
