"""From sequences to log-probs: packed rows, their attention, the head, and the probe that says whether a model may be packed."""
