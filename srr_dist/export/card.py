"""README.md of an output: what it is, how to load and serve it, what it takes, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from srr_dist.export.adapter import VLLM_MAX_RANKS, legal_vllm_rank
from srr_dist.export.quantities import plain, size

METHODS = {
    "srr": "SRR (preserve, quantize, reconstruct; arXiv 2602.02001)",
    "qer": "QER (quantize, then reconstruct)",
    "none": "weight-only quantization, no adapter",
}


@dataclass(frozen=True)
class CardFacts:
    """What a model card states.

    Attributes:
        model: the source model, as a reader knows it.
        method: ``srr``, ``qer`` or ``none``.
        widths: of codes, in bits, from the least; several where layers differ.
        group_size: inputs that share a scale; −1 for one scale per output channel.
        symmetric: whether codes have no zero points.
        codebook: name of the table that codes are looked up in; None for integers.
        rank: largest rank of the adapters; 0 without.
        bits_per_weight: stored bits per quantized weight: codes, scales and adapters.
        base_bytes, adapter_bytes: sizes of the two folders.
        dense_bytes: memory of all weights once transformers has expanded them.
        exports: folders of the output.
        evaluation: what was measured -> its value, as ``{"perplexity, WikiText-2": 10.7}``.
    """

    model: str
    method: str
    widths: tuple[int, ...]
    group_size: int
    rank: int
    bits_per_weight: float
    base_bytes: int
    adapter_bytes: int
    dense_bytes: int
    exports: tuple[str, ...]
    symmetric: bool = True
    codebook: str | None = None
    evaluation: Mapping[str, float] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The card, in Markdown; equal facts give equal text."""
    sections = [_summary(facts)]
    if "base" in facts.exports:
        sections += [_transformers(facts), _vllm(facts)]
    if "dense" in facts.exports:
        sections.append(_merged(facts))
    if facts.evaluation:
        sections.append(_evaluation(facts.evaluation))
    return "\n\n".join(sections) + "\n"


def _summary(facts: CardFacts) -> str:
    scales = ("a" if facts.symmetric else "a zero point and a") + " scale per "
    scales += "output channel" if facts.group_size == -1 else f"{facts.group_size} inputs"
    rows = [
        ("method", METHODS.get(facts.method, facts.method)),
        ("base", f"{_widths(facts.widths)} {facts.codebook.upper() + ' ' if facts.codebook else ''}codes, {scales}"),
        ("adapter", f"rank {facts.rank}, bfloat16" if facts.rank else "none"),
        ("stored per quantized weight", f"{_bits(facts.bits_per_weight)} bits"),
        ("size of `base/`", size(facts.base_bytes) if "base" in facts.exports else "not exported"),
        ("size of `adapter/`", size(facts.adapter_bytes) if "adapter" in facts.exports else "none"),
    ]
    extremes = " to ".join(map(str, sorted({facts.widths[0], facts.widths[-1]})))
    text = f"# {facts.model}, {extremes} bits\n\nEvery quantized weight is W ≈ Q"
    return f"{text}{' + L·R' if facts.rank else ''}.\n\n{_table(('', ''), rows)}"


def _transformers(facts: CardFacts) -> str:
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    lines = [
        'model = AutoModelForCausalLM.from_pretrained("base")',
        'tokenizer = AutoTokenizer.from_pretrained("base")',
    ]
    packages = f"transformers {'bitsandbytes' if facts.codebook else 'compressed-tensors'}"
    if len(facts.widths) > 1:
        lines.insert(1, "model.hf_quantizer.compressor.decompress_model(model)  # layers differ in bits")
    if facts.rank:
        imports.insert(0, "from peft import PeftModel")
        lines.insert(-1, 'model = PeftModel.from_pretrained(model, "adapter")')
        packages += " peft"
    code = "\n".join([*imports, "", *lines])
    heading = f"## transformers\n\n`pip install {packages}`, then, in this folder:\n\n```python\n{code}\n```\n\n"
    if facts.codebook:
        return f"{heading}The codes stay packed: bitsandbytes expands each layer while it computes with it."
    return (
        f"{heading}transformers expands the weights while it loads them: they take {size(facts.dense_bytes)} of "
        "memory, as the original's do. What is small here is the storage."
    )


def _vllm(facts: CardFacts) -> str:
    command = "vllm serve ./base"
    note = "vLLM keeps the codes packed; which widths it can run depends on its version and on the GPU."
    if facts.rank:
        legal = legal_vllm_rank(facts.rank)
        if legal is None:
            return (
                f"## vLLM\n\nvLLM serves adapters up to rank {VLLM_MAX_RANKS[-1]}; these have rank {facts.rank}. "
                "Serve the merged weights instead (`--export dense`)."
            )
        command += f" --enable-lora --max-lora-rank {legal} --lora-modules srr=./adapter"
        note += " Requests name the model `srr`; without the adapter the answers are those of Q alone."
    return f"## vLLM\n\n```sh\n{command}\n```\n\n{note}"


def _merged(facts: CardFacts) -> str:
    return (
        f"## Merged weights\n\n`dense/` holds Q{' + L·R' if facts.rank else ''} as an ordinary checkpoint of "
        f"{size(facts.dense_bytes)}, for anything that reads the original."
    )


def _evaluation(evaluation: Mapping[str, float]) -> str:
    return f"## Measured\n\n{_table(('', 'value'), [(name, plain(value, 5)) for name, value in evaluation.items()])}"


def _widths(widths: tuple[int, ...]) -> str:
    """``3-bit``, or of several ``2-, 3- and 4-bit``."""
    *others, last = widths
    return f"{', '.join(f'{width}-' for width in others)} and {last}-bit" if others else f"{last}-bit"


def _bits(value: float) -> str:
    return plain(None if math.isnan(value) else value)


def _table(heading: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [heading, ("---", "---"), *rows])
