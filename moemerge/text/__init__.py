"""Text as tokens: the mixture's vocabulary, prompts and documents encoded with it."""

from moemerge.text import batching, build_vocabulary
from moemerge.text.documents import documents_of, find, rows_of, texts_of
from moemerge.text.donor_tokens import BASE
from moemerge.text.encoder import PIECE_TOKENS, Encoder, Prompt, open_encoder
from moemerge.text.pictures import Pictures
from moemerge.text.same_tokens import other_ids, shared_rows
from moemerge.text.vocabulary import Vocabulary

__all__ = [
    "BASE",
    "PIECE_TOKENS",
    "Encoder",
    "Pictures",
    "Prompt",
    "Vocabulary",
    "batching",
    "build_vocabulary",
    "documents_of",
    "find",
    "open_encoder",
    "other_ids",
    "rows_of",
    "shared_rows",
    "texts_of",
]
