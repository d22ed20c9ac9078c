"""The sizes of a model, from its config.json and the headers of its safetensors files: no weight is read, no torch imported."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from dpo_loop.errors import PolicyError
from dpo_loop.types import Record
from dpo_loop.weights import NOT_ADAPTABLE, read_header

_NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocabulary": ("vocab_size", "padded_vocab_size"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "multi_query_group_num"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "activation": ("hidden_act", "hidden_activation", "activation_function"),
}
"""What families call the same thing in config.json."""
_NOT_ADAPTABLE = {*NOT_ADAPTABLE, "wpe", "embed_positions", "output", "gate", "router"}
"""Modules by the last part of their name; routers of experts are parameters, not linear layers, in transformers of today."""
_HEAD = re.compile(r"^(lm_head|embed_out|output)\.weight$")
_UNKNOWN_HEAD_SIZE = 64


class ModelShape(Record):
    """Sizes in elements. tensors: the shape of every weight by name, tied ones once."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate: int
    """Of one expert, where there are experts."""
    vocabulary: int
    gated: bool
    """Whether the MLP multiplies a gate, as SwiGLU does; GPT-2 and GPT-NeoX have none."""
    composed_activation: bool
    """Whether the activation is several operations, each of which keeps what it needs for backward."""
    num_experts: int
    experts_per_token: int
    """1 where the MLP is one."""
    eager_attention: bool
    """Whether attention keeps its probabilities: a soft-cap on its scores is in no kernel of transformers'."""
    tensors: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    """What was guessed, and how."""

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.tensors.values()))

    def linears(self, target: str = "all-linear") -> dict[str, tuple[int, int]]:
        """(in, out), or the other way round, of the layers that an adapter with this `lora.target` changes. Experts are not among them."""
        found = {
            name.removesuffix(".weight"): (shape[1], shape[0])
            for name, shape in self.tensors.items()
            if len(shape) == 2
            and name.endswith(".weight")
            and name.split(".")[-2] not in _NOT_ADAPTABLE
            and ".experts." not in name
        }
        if target == "all-linear":
            return found
        wanted = tuple(name.strip() for name in target.split(","))
        return {name: size for name, size in found.items() if name.endswith(tuple("." + each for each in wanted)) or name in wanted}

    def norm_elements(self) -> float:
        """Elements per token that the norms of one layer see, on average."""
        total = 0
        for name, shape in self.tensors.items():
            if len(shape) == 1 and name.endswith(".weight") and re.search(r"\.\d+\.", name):
                heads = self.num_heads if "q_norm" in name else self.num_kv_heads if "k_norm" in name else 1
                total += shape[0] * heads if shape[0] == self.head_size else shape[0]
        return total / self.num_layers


def read_shape(base: Path) -> ModelShape:
    """base: a transformers model directory; without weights in it (a cached config.json alone), their shapes are guessed from the sizes.

    Raises PolicyError if there is no readable config.json, or if it lacks a size for which there is no guess.
    """
    config = _config(base / "config.json")
    text = config.get("text_config") or config
    notes: list[str] = []
    tensors = _tensors(base)
    sizes = _sizes(text, tensors, base, notes)
    if not tensors:
        tensors = _guessed_tensors(sizes, tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))))
        notes.append(f"{base} holds no safetensors: the number of parameters is guessed from config.json")
    elif config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)):
        tensors = {name: shape for name, shape in tensors.items() if not _HEAD.search(name)}
    activation = str(_first(text, "activation") or "")
    return ModelShape(
        **sizes,
        gated=_is_gated(tensors),
        composed_activation=activation in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh_python"),
        eager_attention=bool(text.get("attn_logit_softcapping")),
        tensors=tensors,
        notes=tuple(notes),
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise PolicyError(f"{path} cannot be read ({error.strerror}); give a transformers model directory") from error
    except ValueError as error:
        raise PolicyError(f"{path} is damaged: {error}; copy it again from where the model came from") from error
    if not isinstance(config, dict):
        raise PolicyError(f"{path} holds a {type(config).__name__}, not an object; copy it again from where the model came from")
    return config


def _first(config: dict[str, Any], what: str) -> Any:
    """Some configs give a list, a size for every layer: its largest is taken."""
    value = next((config[name] for name in _NAMES[what] if config.get(name) is not None), None)
    return max(value) if isinstance(value, list) and all(isinstance(each, int) for each in value) and value else value


def _sizes(config: dict[str, Any], tensors: dict[str, tuple[int, ...]], base: Path, notes: list[str]) -> dict[str, int]:
    needed: dict[str, int] = {}
    for what in ("hidden", "num_layers", "vocabulary"):
        needed[what] = _first(config, what) or _by_tensors(what, tensors)
    if missing := [what for what, value in needed.items() if not value]:
        looked = ", ".join(" or ".join(_NAMES[what]) for what in missing)
        raise PolicyError(f"{base / 'config.json'} does not say how large the model is: no {looked}; its memory cannot be planned")
    hidden, num_heads = needed["hidden"], _first(config, "num_heads")
    if not num_heads:
        num_heads = max(1, hidden // _UNKNOWN_HEAD_SIZE)
        notes.append(f"config.json names no attention heads; {num_heads} are taken, as if every layer had attention")
    intermediate = _first(config, "intermediate")
    num_experts = _first(config, "num_experts") or 1
    if num_experts > 1 and config.get("moe_intermediate_size"):
        intermediate = config["moe_intermediate_size"]
    if not intermediate:
        intermediate = 4 * hidden
        notes.append(f"config.json names no size of the MLP; {intermediate} (4 times the hidden size) is taken")
    return {
        **needed,
        "num_heads": num_heads,
        "num_kv_heads": _first(config, "num_kv_heads") or num_heads,
        "head_size": config.get("head_dim") or hidden // num_heads,
        "intermediate": intermediate,
        "num_experts": num_experts,
        "experts_per_token": (_first(config, "experts_per_token") if num_experts > 1 else None) or 1,
    }


def _by_tensors(what: str, tensors: dict[str, tuple[int, ...]]) -> int:
    """0 where they do not say."""
    if what == "num_layers":
        return max((int(match[1]) + 1 for name in tensors if (match := re.search(r"\.(\d+)\.", name))), default=0)
    embedding = next((shape for name, shape in tensors.items() if re.search(r"(embed_tokens|embed_in|wte)\.weight$", name)), (0, 0))
    return embedding[0 if what == "vocabulary" else 1]


def _tensors(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name, from the headers of all shards."""
    index, single = base / "model.safetensors.index.json", base / "model.safetensors"
    if single.is_file():
        paths = [single]  # some repositories hold the same weights a second time, under other names
    elif index.is_file():
        paths = [base / name for name in sorted(set(_config(index).get("weight_map", {}).values()))]
    else:
        paths = sorted(base.glob("*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            found |= {name: tensor.shape for name, tensor in read_header(path).items()}
        except (OSError, ValueError) as error:
            raise PolicyError(f"{path} cannot be read: {error}; copy it again from where the model came from") from error
    return found


def _guessed_tensors(sizes: dict[str, int], *, tied: bool) -> dict[str, tuple[int, ...]]:
    """Of a Llama of these sizes, or of a Mixtral."""
    hidden, inner = sizes["hidden"], sizes["intermediate"]
    queries, keys = sizes["num_heads"] * sizes["head_size"], sizes["num_kv_heads"] * sizes["head_size"]
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if (experts := sizes["num_experts"]) > 1:
        layer |= {f"mlp.experts.{name}": (experts, *shape) for name, shape in mlp.items()}
    else:
        layer |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocabulary"], hidden)}
    for number in range(sizes["num_layers"]):
        found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (hidden,)} | ({} if tied else {"lm_head.weight": (sizes["vocabulary"], hidden)})


def _is_gated(tensors: dict[str, tuple[int, ...]]) -> bool:
    """By the names of its weights; Mixtral calls the gate w1, beside w3."""
    return any(re.search(r"(gate_proj|gate_up_proj|\.w3)\b", name) for name in tensors)
