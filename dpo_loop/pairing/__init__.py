"""Pairing: which two of K become chosen and rejected, and why the others do not."""
