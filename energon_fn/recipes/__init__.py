"""Recipes: what datasets are made of others, in Python or YAML, and how they are opened."""
