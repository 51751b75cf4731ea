"""llama.cpp's names (`tokenizer.ggml.pre`) of byte-level BPE models' pre-tokenizers, and what they do."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers import pre_tokenizers as pt

PROBE = (
    "Hello  world!\n\n\t I'm we'LL  123456 7.89 a_b \u00e9t\u00e9 \u4f60\u597d "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \U0001f600 --- (x)=y;\r\n  end   \n"
    "camelCase HTTPServer iPhone don't DON'TS 'tis 12345678 \u00bd\u2463 x\u00b2 a/b//\n\n!?.\n...\r\n\n ,$ "
    "<=> `|~^\n\u3042\u30a2\u4e2d\u6587\uff0c\u3002 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u201cq\u201d "
    "\u10d0\u10d1 \u01bb \u01c5a e\u0301 "
    "#tag -x /y\n \n  \n          wide               wider z\n   "
)
"""Text on which no two of the pre-tokenizers below agree, but for those that IGNORE_MERGES tells apart."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + SPACES
SEED_CODER = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + SPACES
JAIS2 = LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + (
    "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+@|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*@"
"""Words that end where capitals begin, with @ for what may be joined to them."""

TEKKEN = WORDS.replace("@", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
GPT4O = WORDS.replace("@", CONTRACTIONS + "?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*" + SPACES
)
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
PUNCTUATION = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
BLOOM = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-"
    "\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf"
    "\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-"
    "\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e"
    "\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-"
    "\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters of scripts that have cases, as DeepSeek's tokenizer.json lists them; the inside of brackets."""


def _split(*patterns: str) -> pt.PreTokenizer:
    """Each pattern in its turn cuts what those before it have left."""
    steps = [pt.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pt.Sequence([*steps, pt.ByteLevel(add_prefix_space=False, use_regex=False)])


def _then_gpt2(*steps: pt.PreTokenizer) -> pt.PreTokenizer:
    return pt.Sequence([*steps, pt.ByteLevel(add_prefix_space=False, use_regex=True)])


PRE_TOKENIZERS: dict[str, Callable[[], pt.PreTokenizer]] = {
    "smollm": lambda: _then_gpt2(pt.Digits(individual_digits=True)),
    "gpt-2": lambda: pt.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": lambda: _split(LLAMA3),
    "dbrx": lambda: _split(LLAMA3),
    "qwen2": lambda: _split(QWEN2),
    "qwen35": lambda: _split(QWEN35),
    "tekken": lambda: _split(TEKKEN),
    "gpt-4o": lambda: _split(GPT4O),
    "deepseek-llm": lambda: _split(r"[\r\n]", rf"\s?[{CASED}]+", PUNCTUATION, r"\s+$", CJK_HANGUL, r"\p{N}+"),
    "deepseek-coder": lambda: _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK_HANGUL, r"\p{N}"),
    "deepseek-v3": lambda: _split(r"\p{N}{1,3}", CJK, DEEPSEEK3),
    "falcon": lambda: pt.Sequence(
        [
            pt.Punctuation("contiguous"),
            pt.ByteLevel(add_prefix_space=False, use_regex=True),
            pt.Digits(individual_digits=False),
            pt.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    ),
    "jais-2": lambda: _split(JAIS2),
    "seed-coder": lambda: _split(SEED_CODER),
    "poro-chat": lambda: _split(BLOOM),
    "viking": lambda: _split(BLOOM, r"\p{N}"),
}
"""By one name each; ALIASES has the others."""

ALIASES = {
    other: name
    for name, others in {
        "smollm": "starcoder refact command-r codeshell exaone minerva-7b mellum2",
        "gpt-2": "phi-2 mpt olmo jais gigachat a.x-4.0 mellum modern-bert exaone4 trillion granite-docling",
        "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 glm4 glm5",
        "dbrx": "smaug-bpe chatglm-bpe",
        "qwen2": "deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan solar-open grok-2 bailingmoe "
        "bailingmoe2 llada-moe",
        "gpt-4o": "llama4 kanana2 talkie minimax-m2",
        "deepseek-v3": "hunyuan-dense joyai-llm hy_v4",
        "poro-chat": "bloom gpt3-finnish",
    }.items()
    for other in others.split()
}
"""Names for pre-tokenizers that split a text like one of the above."""


def find_pre_tokenizer(pre: str) -> pt.PreTokenizer | None:
    """The pre-tokenizer of a `tokenizer.ggml.pre`; None if it is not known."""
    make = PRE_TOKENIZERS.get(ALIASES.get(pre, pre))
    return make() if make else None


def normalizer_of(pre: str) -> normalizers.Normalizer | None:
    """The normalizer that goes with a pre-tokenizer."""
    return normalizers.NFC() if pre == "qwen2" else None


LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")

IGNORE_MERGES = (*LLAMA3_NAMES, "glm4", "glm5", "tekken")
"""Those with which a piece that is a token is that token, whatever the merges would make of it."""

ADD_BOS = (*LLAMA3_NAMES, "tekken")
"""Those with which llama.cpp begins a text with the begin token where a file does not say."""


def find_pre(tokenizer: Tokenizer) -> str | None:
    """The name of a tokenizer's pre-tokenizer, found by what it does to PROBE; None if unknown."""
    if tokenizer.pre_tokenizer is None:
        return None
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
    found = [name for name, make in PRE_TOKENIZERS.items() if make().pre_tokenize_str(PROBE) == pieces]
    ignores = getattr(tokenizer.model, "ignore_merges", False)
    return next((name for name in found if (name in IGNORE_MERGES) == ignores), found[0] if found else None)
