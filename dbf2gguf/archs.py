"""What differs between model families: names of modules and tensors, and features, one `ArchSpec` each.

To add a family, add a spec to `ARCHS`; a feature that no spec has yet also needs a field in
`runtime.config.Config` and a branch in both forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from runtime.config import MAX_EXPERTS, MAX_EXPERTS_USED
from runtime.errors import FormatError, UnsupportedModelError

NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH_NORMS = {  # before and after attention and feed-forward
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
AFTER_NORMS = {name: path for name, path in SANDWICH_NORMS.items() if name.startswith("post_")}
ACTIVATIONS = {"silu": ("silu", "swish"), "gelu_tanh": ("gelu_pytorch_tanh", "gelu_new")}
"""Our names of activations -> transformers'."""

ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation_function")
"""Where config.json says which it is."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""transformers' layer_types: with a window, and without."""

INPUT = "input"
"""Residual of a linear whose output is added to the block's input."""


@dataclass(frozen=True)
class Group:
    """Linears that read the same vector. Groups are factorized in order, each on the inputs that the
    factorized groups before it produce."""

    linears: tuple[str, ...]
    residual: str | None = None  # what the output is added to: INPUT, the submodule that reads it, or None


@dataclass(frozen=True)
class Fused:
    """Linears that transformers and llama.cpp hold as one, their rows one after the other.
    `source.split_fused` puts the parts in the module's place, each under its GGUF name."""

    module: str
    parts: tuple[str, ...]

    @property
    def linears(self) -> dict[str, str]:
        """GGUF name -> module, of the parts."""
        return {part: f"{self.module}.{part}" for part in self.parts}


EXPERT_LINEARS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
"""GGUF names of an expert's linears -> modules within it."""

EXPERT_GROUPS = (("ffn_gate", "ffn_up"), ("ffn_down",))
"""Those that read the same vector, in the order in which an expert runs."""


@dataclass(frozen=True)
class Experts:
    """Where a layer's feed-forward are experts, of which a router picks some for each token. Paths are
    relative to the layer. transformers holds the experts' weights as two tensors; `source.split_fused` puts a
    list of modules in their place."""

    norm_shares: bool  # what llama.cpp takes for granted: whether shares are divided by the sum of those used
    own_width: bool = True  # whether config.json has a size of experts, moe_intermediate_size
    shared: str | None = None  # the expert that all tokens share
    shared_gate: str | None = None  # whose sigmoid is its share
    block: str = "mlp"  # the feed-forward: its input is the experts', its output is added to the stream
    module: str = "mlp.experts"
    router: str = "mlp.gate"  # (tokens, d_model) -> logits, shares, experts used
    residual: str = "post_attention_layernorm"  # what reads the stream that the output is added to
    in_files: dict[str, str] = field(default_factory=dict)  # parts of names -> how checkpoints have them

    def branches(self, n_experts: int) -> dict[str, str]:
        """End of the GGUF names ("ffn_gate" + it) -> module, of every expert and of the shared one."""
        found = {} if self.shared is None else {"_shexp": self.shared}
        return found | {f".{index}": f"{self.module}.{index}" for index in range(n_experts)}


@dataclass(frozen=True)
class TextPart:
    """Where a family's text model is in models that read more than text."""

    model_type: str  # of the text model: the family whose part it is
    config: str  # config.json's entry about it
    in_files: dict[str, str]  # how names of its tensors begin in files -> in the text model
    left_out: tuple[str, ...]  # how names of the other tensors begin

    def name(self, stored: str) -> str | None:
        """The text model's name of a tensor of a file; None where it is of what is left out."""
        if stored.startswith(self.left_out):
            return None
        for theirs, ours in self.in_files.items():
            if stored.startswith(theirs):
                return ours + stored.removeprefix(theirs)
        return stored


GPT2_QKV = Fused("attn.c_attn", ("attn_q", "attn_k", "attn_v"))
PHI_QKV = Fused("self_attn.qkv_proj", ("attn_q", "attn_k", "attn_v"))
PHI_GATE_UP = Fused("mlp.gate_up_proj", ("ffn_gate", "ffn_up"))


@dataclass(frozen=True)
class ArchSpec:
    """One model family. Paths are dotted module names of transformers; `norms` and `linears` are relative
    to a decoder layer and map GGUF names to them."""

    model_type: str  # config.json's model_type
    model_class: str  # config.json's architectures
    gguf: str  # general.architecture
    rope_pairing: str  # "adjacent" or "halves", see runtime.config
    activation: str = "silu"
    norm: str = "rms"
    norm_offset: float = 0.0  # transformers adds it to a norm's weights, which GGUF holds as they are used
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    attn_softcap: bool = False  # scores of attention may be capped
    scale_keys: bool = False  # llama.cpp reads the scales of embeddings, attention, residuals and logits
    windows: int = 0  # some layers have a sliding window; in llama.cpp, all but every so many
    window_of_all: bool = False  # all layers have it, if there is one, which llama.cpp does not compute
    window_told: bool = False  # llama.cpp wants its key, be it 0
    local_theta: float | None = None  # RoPE's base there, where a GGUF file does not say
    layers_of_largest: int = 0  # by which llama.cpp knows those with another scale of attention
    decoder: str = "model"
    layers: str = "model.layers"
    embed: str = "model.embed_tokens"
    out_norm: str = "model.norm"
    positions: str | None = None  # the embedding of positions, in place of RoPE
    head: str = "lm_head"
    linears: dict[str, str] = field(
        default_factory=lambda: {
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }
    )
    norms: dict[str, str] = field(default_factory=lambda: NORMS)
    fused: dict[str, Fused] = field(default_factory=dict)  # by its GGUF name
    experts: Experts | None = None
    text: TextPart | None = None  # what alone is converted; all else here is of that
    partial_rotary: bool = False  # RoPE may turn only the first dimensions of a head
    no_rope: int = 0  # some layers have no RoPE; in llama.cpp, one of so many
    longrope: bool = False  # RoPE may have factors of its own for short and for long contexts
    groups: tuple[Group, ...] = (
        Group(("attn_q", "attn_k", "attn_v")),
        Group(("attn_output",), residual=INPUT),
        Group(("ffn_gate", "ffn_up")),
        Group(("ffn_down",), residual="post_attention_layernorm"),
    )

    def linears_of(self, config: Any) -> dict[str, str]:
        """`linears` and those of the experts that a layer of a model of this (transformers') config has."""
        found = dict(self.linears)
        if self.experts is not None:
            for end, path in self.experts.branches(features(config).n_experts).items():
                found |= {name + end: f"{path}.{linear}" for name, linear in EXPERT_LINEARS.items()}
        return found


ATTENTION_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
ATTENTION_GROUPS = (Group(("attn_q", "attn_k", "attn_v")), Group(("attn_output",), residual=INPUT))
"""Of families with experts, which come after these."""

SANDWICH_GROUPS = (
    Group(("attn_q", "attn_k", "attn_v")),
    Group(("attn_output",)),
    Group(("ffn_gate", "ffn_up")),
    Group(("ffn_down",)),
)
"""Where norms lie between a linear and the residual stream, its output cannot make up for what that lacks."""

GEMMA3 = ArchSpec(
    "gemma3_text",
    "Gemma3ForCausalLM",
    "gemma3",
    "halves",
    activation="gelu_tanh",
    norms=SANDWICH_NORMS | HEAD_NORMS,
    groups=SANDWICH_GROUPS,
    norm_offset=1.0,
    scaled_embedding=True,
    windows=6,
    local_theta=10000.0,
    layers_of_largest=62,
)

ARCHS = {
    spec.model_type: spec
    for spec in (
        ArchSpec("llama", "LlamaForCausalLM", "llama", "adjacent"),
        ArchSpec("mistral", "MistralForCausalLM", "llama", "adjacent", window_of_all=True),
        ArchSpec("smollm3", "SmolLM3ForCausalLM", "smollm3", "adjacent", no_rope=4),
        ArchSpec("granite", "GraniteForCausalLM", "granite", "adjacent", scale_keys=True),
        ArchSpec(
            "olmo2",
            "Olmo2ForCausalLM",
            "olmo2",
            "halves",
            norms=AFTER_NORMS | HEAD_NORMS,
            groups=SANDWICH_GROUPS,
        ),
        ArchSpec("qwen2", "Qwen2ForCausalLM", "qwen2", "halves"),
        ArchSpec("qwen3", "Qwen3ForCausalLM", "qwen3", "halves", norms=NORMS | HEAD_NORMS),
        ArchSpec(
            "mixtral",
            "MixtralForCausalLM",
            "llama",
            "adjacent",
            window_of_all=True,
            linears=ATTENTION_LINEARS,
            groups=ATTENTION_GROUPS,
            experts=Experts(
                norm_shares=True,
                own_width=False,
                in_files={
                    ".mlp.": ".block_sparse_moe.",
                    ".gate_proj.": ".w1.",
                    ".up_proj.": ".w3.",
                    ".down_proj.": ".w2.",
                },
            ),
        ),
        ArchSpec(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            "qwen2moe",
            "halves",
            linears=ATTENTION_LINEARS,
            groups=ATTENTION_GROUPS,
            experts=Experts(
                norm_shares=False, shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate"
            ),
        ),
        ArchSpec(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "qwen3moe",
            "halves",
            linears=ATTENTION_LINEARS,
            norms=NORMS | HEAD_NORMS,
            groups=ATTENTION_GROUPS,
            experts=Experts(norm_shares=True),
        ),
        ArchSpec(
            "gpt2",
            "GPT2LMHeadModel",
            "gpt2",
            "halves",
            activation="gelu_tanh",
            norm="layer",
            decoder="transformer",
            layers="transformer.h",
            embed="transformer.wte",
            positions="transformer.wpe",
            out_norm="transformer.ln_f",
            linears={
                **GPT2_QKV.linears,
                "attn_output": "attn.c_proj",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
            fused={"attn_qkv": GPT2_QKV},
            norms={"attn_norm": "ln_1", "ffn_norm": "ln_2"},
            groups=(
                Group(("attn_q", "attn_k", "attn_v")),
                Group(("attn_output",), residual=INPUT),
                Group(("ffn_up",)),
                Group(("ffn_down",), residual="ln_2"),
            ),
        ),
        ArchSpec(
            "phi3",
            "Phi3ForCausalLM",
            "phi3",
            "halves",
            linears={
                **PHI_QKV.linears,
                "attn_output": "self_attn.o_proj",
                **PHI_GATE_UP.linears,
                "ffn_down": "mlp.down_proj",
            },
            fused={"attn_qkv": PHI_QKV, "ffn_up": PHI_GATE_UP},
            window_of_all=True,
            window_told=True,
            partial_rotary=True,
            longrope=True,
        ),
        ArchSpec(
            "gemma2",
            "Gemma2ForCausalLM",
            "gemma2",
            "halves",
            activation="gelu_tanh",
            norms=SANDWICH_NORMS,
            groups=SANDWICH_GROUPS,
            norm_offset=1.0,
            scaled_embedding=True,
            attn_softcap=True,
            windows=2,
            layers_of_largest=46,
        ),
        GEMMA3,
        replace(
            GEMMA3,
            model_type="gemma3",
            model_class="Gemma3ForConditionalGeneration",
            text=TextPart(
                GEMMA3.model_type,
                "text_config",
                in_files={
                    "model.language_model.": "model.",  # as transformers names its modules
                    "language_model.model.": "model.",  # as published
                    "language_model.lm_head.": "lm_head.",
                },
                left_out=(
                    "model.vision_tower.",
                    "model.multi_modal_projector.",
                    "vision_tower.",
                    "multi_modal_projector.",
                ),
            ),
        ),
    )
}
"""Of those that share a GGUF architecture, a GGUF file is read as the first: of those with experts, if it has
any, and of those that may have a sliding window, if it has one."""


def gguf_spec(name: object, has_experts: bool, has_window: bool = False) -> ArchSpec | None:
    """The family as which a GGUF file of this architecture is read. With a window, it is one that has none
    where no other is known."""
    found = [s for s in ARCHS.values() if s.gguf == name and (s.experts is not None) == has_experts]
    fitting = [s for s in found if s.windows or s.window_of_all] if has_window else []
    return next(iter(fitting or found), None)


def find_arch(config: dict[str, Any], where: str) -> ArchSpec:
    """The spec for a config.json. Raises UnsupportedModelError for a family or a feature that is not
    implemented, naming it and what is; FormatError for one that makes no sense."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHS:
        known = ", ".join(sorted(ARCHS))
        raise UnsupportedModelError(
            f"{where}: model_type {model_type!r} is not supported; supported: {known}"
        )
    if config.get("quantization_config"):
        raise UnsupportedModelError(
            f"{where}: has a quantization_config: the weights are quantized already; take the original"
        )
    spec = ARCHS[model_type]
    if spec.text is not None:
        _check_text_part(config, spec.text, where)
        return spec
    activations = dict.fromkeys(ACTIVATION_KEYS, (*ACTIVATIONS[spec.activation], None))
    wanted: dict[str, tuple[Any, ...]] = {
        **activations,
        "use_bidirectional_attention": (False, None),
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
        "mlp_only_layers": ([], None),
        "decoder_sparse_step": (1, None),
    }
    for key, values in wanted.items():
        got = config.get(key)
        if got not in values:
            raise UnsupportedModelError(
                f"{where}: {key} = {got!r} is not supported; supported: {values[0]!r}"
            )
    _check_experts(config, spec, where)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise FormatError(f"{where}: RoPE parameters are {rope!r}; wanted an object")
    for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        kinds = ("default", "linear", "llama3", *(("longrope", "su") if spec.longrope else ()))
        if kind not in kinds:
            raise UnsupportedModelError(
                f"{where}: RoPE scaling {kind!r} is not supported; supported: {', '.join(kinds)}"
            )
        partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1.0) and not spec.partial_rotary:
            raise UnsupportedModelError(
                f"{where}: partial_rotary_factor = {partial!r} is not supported; supported: 1.0"
            )
    return spec


def _check_text_part(config: dict[str, Any], text: TextPart, where: str) -> None:
    inner = config.get(text.config)
    if not isinstance(inner, dict):
        raise FormatError(f"{where}: {text.config} is {inner!r:.60}; wanted an object")
    model_type = inner.get("model_type", text.model_type)
    if model_type != text.model_type:
        raise UnsupportedModelError(
            f"{where}: {text.config} has the model_type {model_type!r}; supported: {text.model_type!r}"
        )
    find_arch(inner | {"model_type": model_type}, f"{where}: {text.config}")


def _check_experts(config: dict[str, Any], spec: ArchSpec, where: str) -> None:
    n_experts = config.get("num_experts", config.get("num_local_experts"))
    n_used = config.get("num_experts_per_tok")
    if spec.experts is None or n_experts is None or n_used is None:
        return  # the library's own defaults
    for key, value, most in (
        ("experts", n_experts, MAX_EXPERTS),
        ("experts_per_tok", n_used, MAX_EXPERTS_USED),
    ):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise FormatError(f"{where}: num_{key} is {value!r:.60}; wanted an integer in 1..{most}")
    if n_used > n_experts:
        raise FormatError(
            f"{where}: num_experts_per_tok is {n_used}; wanted no more than there are experts, {n_experts}"
        )


@dataclass(frozen=True)
class Features:
    """What a model computes otherwise than Llama, by its config.json; see `runtime.config.Config`."""

    n_kv_heads: int
    d_ff: int
    norm_eps: float
    rope_theta: float
    rope_theta_local: float | None  # of layers with a window; None if it is that of the others
    rope_factor: float  # of linear scaling
    rope_dims: int
    rope_short: tuple[float, ...]  # LongRoPE's factors up to the original context length; empty without it
    rope_long: tuple[float, ...]  # and beyond
    n_ctx_original: int
    rotates: tuple[bool, ...]  # of each layer: whether it has RoPE; empty if all have
    windows: tuple[int, ...]  # of each layer; 0 for none
    embed_scale: float
    attn_scale: float  # 0: 1/sqrt(head_dim)
    attn_softcap: float
    logit_softcap: float
    residual_scale: float
    logit_scale: float
    n_experts: int  # 0: there are none
    n_experts_used: int
    d_expert: int
    d_shared: int  # of the expert that all tokens share; 0: there is none
    norm_shares: bool  # whether shares of experts are divided by the sum of those that are used


def features(config: Any) -> Features:
    """Those of transformers' config of one of ARCHS."""
    spec = ARCHS[config.model_type]
    size = head_dim(config)
    rope = _rope_parameters(config, FULL)
    local = _rope_parameters(config, SLIDING)
    local_theta = local.get("rope_theta") or getattr(config, "rope_local_base_freq", None)
    linear = rope.get("rope_type", rope.get("type")) == "linear"  # the others are in rope_freqs.weight
    query = getattr(config, "query_pre_attn_scalar", None) or size
    scale = getattr(config, "attention_multiplier", None) or query**-0.5
    embed_scale = config.hidden_size**0.5
    return Features(
        n_kv_heads=config.num_attention_heads if spec.positions else config.num_key_value_heads,
        d_ff=config.n_inner or 4 * config.hidden_size if spec.positions else config.intermediate_size,
        norm_eps=config.layer_norm_epsilon if spec.norm == "layer" else config.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0),
        rope_theta_local=float(local_theta) if spec.windows and local_theta else None,
        rope_factor=float(rope["factor"]) if linear else 1.0,
        rope_dims=int(size * (rope.get("partial_rotary_factor") or 1.0)) if spec.partial_rotary else size,
        rope_short=tuple(rope.get("short_factor") or ()),
        rope_long=tuple(rope.get("long_factor") or ()),
        n_ctx_original=int(
            rope.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", 0)
        ),
        rotates=_rotates(config, spec),
        windows=_windows(config, spec),
        embed_scale=embed_scale if spec.scaled_embedding else getattr(config, "embedding_multiplier", 1.0),
        attn_scale=0.0 if scale == size**-0.5 else scale,
        attn_softcap=(config.attn_logit_softcapping or 0.0) if spec.attn_softcap else 0.0,
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),
        n_experts=config.num_experts if spec.experts else 0,
        n_experts_used=config.num_experts_per_tok if spec.experts else 0,
        d_expert=_expert_width(config, spec),
        d_shared=config.shared_expert_intermediate_size if spec.experts and spec.experts.shared else 0,
        norm_shares=bool(getattr(config, "norm_topk_prob", True)),
    )


def _expert_width(config: Any, spec: ArchSpec) -> int:
    if spec.experts is None:
        return 0
    return int(config.moe_intermediate_size if spec.experts.own_width else config.intermediate_size)


def _windows(config: Any, spec: ArchSpec) -> tuple[int, ...]:
    window = config.sliding_window if spec.windows or spec.window_of_all else 0
    if not window:
        return ()
    if spec.window_of_all:
        return (int(window),) * int(config.num_hidden_layers)
    return tuple(window if kind == SLIDING else 0 for kind in config.layer_types)


def _rotates(config: Any, spec: ArchSpec) -> tuple[bool, ...]:
    if spec.positions:
        return (False,) * int(config.num_hidden_layers)
    return tuple(map(bool, config.no_rope_layers)) if spec.no_rope else ()


def head_dim(config: Any) -> int:
    """Dimensions of a head, by transformers' config."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _rope_parameters(config: Any, layer_type: str) -> dict[str, Any]:
    """RoPE's parameters in layers of a type; those of SLIDING are empty where they are not set apart."""
    every = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if layer_type in every:
        return dict(every[layer_type])
    return {} if layer_type == SLIDING else dict(every)


def context_length(config: Any) -> int:
    """How many tokens a model may have: of transformers' config, what it was trained for, but no more than a
    sliding window of a family whose windows are not computed: within it, attention is like any other."""
    spec = ARCHS.get(getattr(config, "model_type", None))
    if spec and (spec.windows or spec.window_of_all):
        return int(config.max_position_embeddings)
    return plain_length(config)


def plain_length(config: Any) -> int:
    """The same, but no more than a sliding window that llama.cpp does not compute: within it, both give the
    same."""
    trained: int = config.max_position_embeddings
    window: int | None = getattr(config, "sliding_window", None)
    spec = ARCHS.get(getattr(config, "model_type", None))
    return trained if not window or (spec and spec.windows) else min(trained, window)


def permute_rope(rows: Any, n_heads: int) -> Any:
    """Reorder the rows of a q or k projection from transformers' halves (i, i + d/2) to llama.cpp's
    adjacent pairs (2i, 2i + 1), head by head. Works on NumPy arrays and tensors, rows first."""
    shape = rows.shape
    return rows.reshape(n_heads, 2, shape[0] // n_heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def unpermute_rope(rows: Any, n_heads: int) -> Any:
    """The inverse of `permute_rope`."""
    shape = rows.shape
    return rows.reshape(n_heads, shape[0] // n_heads // 2, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
