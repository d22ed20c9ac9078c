"""Calls in batches: half the price, an answer within a day, and no batch sent twice or lost, whatever is killed when."""
