"""Training: SFT and LoRA DPO on torch, transformers and peft, resumable at any step."""

import os

# Must be set before torch loads its OpenMP. Threads that spin while they wait for one another collapse on a machine that other processes
# use too. SFT of the demo's size on two shared cores, load 5 to 10: 65 to 900 tokens/s spinning (5,600 with the machine to itself), 800
# to 1,000 when the threads sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
