"""MODEL OUT: a finished model, how it is stored, described, read again and checked.

packing     codes <-> the dense bit stream of compressed-tensors
base        packed linears, their configuration and shards
adapter     L and R as a PEFT LoRA adapter of scale 1
tensorfile  safetensors files in an object store
assemble    committed blocks -> base/, adapter/, dense/, manifest, COMMIT
load        a finished output, block by block
verify      a finished output checked against itself
card        README.md of an output
report      report.html, with its sections, pictures, markup and numbers beside it
"""

from srr_dist.export.assemble import EXPORTS, Output, assemble
from srr_dist.export.card import CardFacts, model_card
from srr_dist.export.load import QuantizedModel
from srr_dist.export.verify import verify_output

__all__ = ["EXPORTS", "CardFacts", "Output", "QuantizedModel", "assemble", "model_card", "verify_output"]
