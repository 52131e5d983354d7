"""Sources: opened by their headers; tensors are read only when they are needed."""

from moemerge.checkpoint.claims import TIED
from moemerge.checkpoint.donor import Donor, Opener
from moemerge.checkpoint.formats import read_header, weight_suffixes
from moemerge.checkpoint.gguf.blocks import ENCODINGS, NUMBERS, QUANTISED, encode
from moemerge.checkpoint.gguf.header import read_header as read_gguf_header
from moemerge.checkpoint.gguf.imatrix import COUNTS, SUMS, weights_of
from moemerge.checkpoint.gguf.kinds import llama3_factors
from moemerge.checkpoint.gguf.quantise import INSTALL, lacks
from moemerge.checkpoint.gguf.tokenizer import fields_of_files as tokenizer_fields
from moemerge.checkpoint.location import (
    FLOATS,
    PLAIN,
    Encoding,
    Location,
    check_unchanged,
    numpy_dtype,
    read_bytes,
    read_into,
    read_numbers,
    read_rows,
    read_values,
)
from moemerge.checkpoint.lora import Adapter, open_adapter
from moemerge.checkpoint.not_a_model import SourceProblem
from moemerge.checkpoint.open import Checkpoint, fetch, open_checkpoint, with_rows
from moemerge.checkpoint.reference import (
    NoSource,
    Reference,
    is_hub_id,
    last_part,
    nearest_directory,
    parse_source,
    places,
)

__all__ = [
    "COUNTS",
    "ENCODINGS",
    "FLOATS",
    "INSTALL",
    "NUMBERS",
    "PLAIN",
    "QUANTISED",
    "SUMS",
    "TIED",
    "Adapter",
    "Checkpoint",
    "Donor",
    "Encoding",
    "Location",
    "NoSource",
    "Opener",
    "Reference",
    "SourceProblem",
    "check_unchanged",
    "encode",
    "fetch",
    "is_hub_id",
    "lacks",
    "last_part",
    "llama3_factors",
    "nearest_directory",
    "numpy_dtype",
    "open_adapter",
    "open_checkpoint",
    "parse_source",
    "places",
    "read_bytes",
    "read_gguf_header",
    "read_header",
    "read_into",
    "read_numbers",
    "read_rows",
    "read_values",
    "tokenizer_fields",
    "weight_suffixes",
    "weights_of",
    "with_rows",
]
