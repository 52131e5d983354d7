"""The tokens of every model that may give some to the mixture's vocabulary, each read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from moemerge.checkpoint import Donor
from moemerge.config import MergeConfig
from moemerge.errors import Findings
from moemerge.tokenizer import Tokens, read_tokens

BASE, UNION = "base", "union"


class UnknownTokensError(Exception):
    """The tokens of a model cannot be known; `reason` says why."""

    def __init__(self, donor: Donor, reason: str):
        super().__init__(donor, reason)
        self.donor, self.reason = donor, reason


@dataclass(frozen=True)
class Request:
    """The vocabulary that a config asks for, and the models that it is made from.

    `owner` is the model whose tokenizer it is. `experts` are the experts, then the shared ones.
    `tokens` has the tokens of each model's directory, or the reason why they cannot be read.
    """

    config: MergeConfig
    base: Donor
    owner: Donor
    experts: tuple[Donor, ...]
    findings: Findings
    tokens: Mapping[Path, Tokens | ValueError]

    @property
    def is_union(self) -> bool:
        """Whether the vocabulary joins the tokens of all models."""
        return self.config.tokenizer == UNION

    def tokens_of(self, donor: Donor) -> Tokens:
        """The tokens of a model.

        Raises:
            UnknownTokensError: its tokenizer cannot be read.
        """
        found = self.tokens[donor.model.directory]
        if isinstance(found, ValueError):
            raise UnknownTokensError(donor, str(found)) from found
        return found


def read_all(donors: Iterable[Donor]) -> dict[Path, Tokens | ValueError]:
    """The tokens of each model by its directory; a `ValueError` where they cannot be read."""
    found: dict[Path, Tokens | ValueError] = {}
    for directory in {donor.model.directory: None for donor in donors}:
        try:
            found[directory] = read_tokens(directory)
        except ValueError as error:
            found[directory] = error
    return found
