"""Training: SFT and LoRA DPO on torch, transformers and peft, resumable at any step."""
