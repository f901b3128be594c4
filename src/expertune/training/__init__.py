"""A whole run: recipe, data, training, and the folder that is taken home."""
