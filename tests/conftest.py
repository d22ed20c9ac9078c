"""What every test stands on: no vendor, no hub and no server but those a test starts itself; the same examples every time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

for name in list(os.environ):
    if name.endswith("_BASE_URL") or name in {
        "OPENAI_API_KEY",
        "ANTHROPIC_API_KEY",
        "PREFECT_API_URL",
        "PREFECT_API_AUTH_STRING",
        "HF_TOKEN",
    }:
        del os.environ[name]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}

# These machines are noisy: time limits of single examples would only measure the neighbours.
settings.register_profile(
    "dpo-loop", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dpo-loop")
