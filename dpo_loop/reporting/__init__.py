"""Reporting: what a person sees of a round and of a run."""
