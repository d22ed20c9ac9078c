"""How much memory training will take, and took."""
