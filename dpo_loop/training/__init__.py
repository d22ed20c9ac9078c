"""Training: SFT and LoRA DPO on torch, transformers and peft, resumable at any step."""

from dpo_loop.openmp import wait_briefly

wait_briefly()
