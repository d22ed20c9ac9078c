"""Capability tasks of other evaluation libraries, each in a process of its own: `python -m dpo_loop.generation.producers.lm_eval REQUEST.json`.

The interpreter may be another one than dpo-loop's: it needs the library, transformers, peft and pydantic, and no vLLM. The process loads
the policy with transformers+peft, proves it with the policy's canary, and writes the rows that it was asked for, whole or not at all.
It runs in the folder that the task's files are in. dpo-loop itself imports `start` and `request` only.
"""
