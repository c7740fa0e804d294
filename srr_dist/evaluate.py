"""``python -m srr_dist.evaluate``: how far a quantized model's predictions are from its original's."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from srr_dist.command import add_options, run_command
from srr_dist.config import DTYPES, JobConfig, resolve_options

_JOB_FIELDS = ("workers", "ray_address", "gpu_memory", "host_memory", "blocks_per_stage", "model_root")


def main(arguments: Sequence[str] | None = None) -> int:
    """Stream both models over a text, print the figures as JSON and keep them with the output."""
    parser = argparse.ArgumentParser(prog="srr-dist evaluate", description="Perplexity and KL against the original.")
    parser.add_argument("--model", required=True, help="the original checkpoint, as for quantize")
    parser.add_argument("--revision", default=None, help="revision of a hub checkpoint")
    parser.add_argument("--quantized", required=True, help="folder or URL of the output")
    parser.add_argument("--text", required=True, help="text to predict, as for --calibration")
    parser.add_argument("--num-samples", type=int, default=8, help="sequences (default: 8)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a sequence (default: 1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="type of the forward passes (default: auto)")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures to this file")
    parser.add_argument("--no-record", action="store_true", help="do not add the figures to the output's report")
    add_options(parser, (field for name, field in JobConfig.__dataclass_fields__.items() if name in _JOB_FIELDS))
    options = vars(parser.parse_args(arguments))
    job_options = {name: options[name] for name in _JOB_FIELDS if name in options}

    def work() -> int:
        from srr_dist.export import add_evaluation
        from srr_dist.pipeline.evaluation import EvaluationConfig, evaluate
        from srr_dist.store import ObjectStore

        model = resolve_options({"model": options["model"]} | job_options, None)["model"]
        config = EvaluationConfig(
            model=model,
            quantized=options["quantized"],
            text=options["text"],
            num_samples=options["num_samples"],
            seq_len=options["seq_len"],
            dtype=options["dtype"],
            revision=options["revision"],
        )
        figures = evaluate(config, JobConfig(**job_options))
        text = json.dumps(figures, indent=2)
        if options["json"] is not None:
            options["json"].write_text(text + "\n", encoding="utf-8")
        if not options["no_record"]:
            add_evaluation(ObjectStore(config.quantized), figures)
        print(text)
        return 0

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
