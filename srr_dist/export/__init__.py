"""MODEL OUT: a finished model, how it is stored, described, read again and checked.

packing     codes <-> the dense bit stream of compressed-tensors
nf4         linears as bitsandbytes stores them
base        packed linears, their configuration and shards
adapter     L and R as a PEFT LoRA adapter of scale 1
tensorfile  safetensors files in an object store
assemble    committed blocks -> base/, adapter/, dense/, manifest, COMMIT
load        a finished output, block by block
verify      a finished output checked against itself
card        README.md of an output
views       report.json, report.html and README.md, made from records and evaluations
report      report.html, with its sections, pictures, markup and numbers beside it
"""

from srr_dist.export.assemble import EXPORTS, Output, assemble, is_complete
from srr_dist.export.load import QuantizedModel
from srr_dist.export.verify import verify_output
from srr_dist.export.views import add_evaluation, write_views

__all__ = [
    "EXPORTS",
    "Output",
    "QuantizedModel",
    "add_evaluation",
    "assemble",
    "is_complete",
    "verify_output",
    "write_views",
]
