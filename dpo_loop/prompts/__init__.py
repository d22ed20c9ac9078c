"""Prompts: a pool, evaluation prompts carved out first, a fresh split for each round."""
