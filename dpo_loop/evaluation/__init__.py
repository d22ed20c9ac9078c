"""Evaluation: graded answers in, paired statistics, checks and a gate decision out."""
