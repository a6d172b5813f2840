"""The whole of NeFT from a recipe: find the neurons that matter, train them and nothing else, cut a patch."""
