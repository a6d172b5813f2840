"""Recipes: probe, choose, train the chosen neurons and nothing else, and cut the patch."""
