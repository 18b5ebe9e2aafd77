"""Samples that fail: found, written down, looked at step by step, left out."""
