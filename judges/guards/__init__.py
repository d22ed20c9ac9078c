"""Guard models: what each format is asked, and what its reply says of an answer. The formats are those that their makers publish."""

from judges.config import GuardFormat
from judges.guards.form import Form
from judges.guards.llama_guard import LlamaGuard
from judges.guards.shieldgemma import ShieldGemma
from judges.guards.wildguard import WildGuard

__all__ = ["FORMS"]

FORMS: dict[GuardFormat, Form] = {"llama_guard": LlamaGuard(), "shieldgemma": ShieldGemma(), "wildguard": WildGuard()}
