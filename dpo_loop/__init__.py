"""One round's machinery of iterative DPO. Knows no orchestrator and no judge vendor.

Rooms, in the order data walks through them: prompts, generation, (judges, a package of its own), pairing, training, evaluation,
reporting. They never import one another: they meet on disk, on the ground floor of `types errors config artifacts layout`.
"""

__version__ = "0.1.0"
