"""Which vocabulary a config asks for: a tokenizer, what is added to it, and each row's origin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moemerge.checkpoint import Donor, places
from moemerge.config import MergeConfig
from moemerge.errors import Findings, nearest
from moemerge.families import record_of
from moemerge.text.donor_tokens import BASE, UNION, Request, UnknownTokensError, read_all
from moemerge.text.extend_tokenizer import extended, with_template_of_an_expert
from moemerge.text.row_origins import origins, padded, with_rows
from moemerge.text.vocabulary import Vocabulary, size_of
from moemerge.tokenizer import Token, Tokens, parse_tokens, with_added_tokens

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


_OF_LAYERS = "model.embed_tokens_"
"""What names of embeddings for each layer begin with."""


def choose(
    config: MergeConfig,
    base: Donor,
    donors: Sequence[Donor | None],
    findings: Findings,
) -> Vocabulary:
    """The vocabulary that the config asks for; every problem with it is recorded.

    `donors` are the experts, then the shared ones. `tokenizer: union` adds the tokens that the
    base model's tokenizer lacks and theirs have, in their order, after the base model's rows (as
    Cui et al. 2023, Chinese-LLaMA, https://arxiv.org/abs/2304.08177). A new token's rows are those
    of the first expert that has it. A token that no model has begins as the mean of its pieces'
    rows (Koto et al. 2021, https://arxiv.org/abs/2109.04607).

    `pad_vocabulary` adds rows without a token until their number is a multiple of it. Such a row
    is the mean of rows from all over the vocabulary. The probability of a mean is at most the mean
    of their probabilities. A row of zeros would give logit 0, which is more than any token has in
    a model whose logits are all negative (Hewitt 2021,
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
    """
    made = _choose(config, base, donors, findings)
    record = record_of(base.model.config)
    tables = record.top(base.model.config) if record else ()
    if made.rows and any(name.startswith(_OF_LAYERS) for name in tables):
        what = "would change a vocabulary that has embeddings for each layer too"
        key = "tokenizer" if config.tokenizer != BASE else "extra_tokens"
        key = key if key != "extra_tokens" or config.extra_tokens else "pad_vocabulary"
        findings.problem(config.where(key), what, "leave it out for this base model")
    return made


def _choose(
    config: MergeConfig, base: Donor, donors: Sequence[Donor | None], findings: Findings
) -> Vocabulary:
    refused, multiple = len(findings.problems), config.pad_vocabulary
    owner = _owner(config, base, donors, findings)
    extra = _extra(config, findings)
    if multiple < 1:
        what, fix = f"is {multiple}", "write what the size is to be a multiple of: 64"
        findings.problem(config.where("pad_vocabulary"), what, fix)
    plain = Vocabulary(base, base.model.directory)
    if owner is None or len(findings.problems) > refused:
        return plain
    if owner is base and config.tokenizer != UNION and not config.extra_tokens:
        return padded(plain, multiple, findings)
    experts = tuple(donor for donor in donors if donor)
    tokens = read_all([base, *experts])
    try:
        return _built(Request(config, base, owner, experts, findings, tokens), extra)
    except UnknownTokensError as error:
        fix = "add its tokenizer.json, or use tokenizer: base and no extra_tokens"
        what = f"its tokens cannot be used: {error.reason}"
        findings.problem(error.donor.where, what, fix)
        return plain


def _built(request: Request, extra: list[Token] | Tokens) -> Vocabulary:
    """The owner's tokenizer with every added token, and the rows of each."""
    base, owner, multiple = request.base, request.owner, request.config.pad_vocabulary
    for donor in (base, owner):
        its = request.tokens_of(donor)
        if its.size - 1 >= size_of(donor) + len(its.ids):
            raise UnknownTokensError(donor, f"one has the id {its.size - 1}")
    tokens, added = extended(request, extra)
    directory = owner.model.directory
    try:
        written = with_added_tokens(directory, tokens, added) if added else {}
        if request.is_union:
            written = with_template_of_an_expert(request, written, tokens)
    except ValueError as error:
        raise UnknownTokensError(owner, str(error)) from error
    config = {} if owner is base else _special_ids(owner)
    made = Vocabulary(base, directory, written, config)
    if owner is base and not added:
        return padded(made, multiple, request.findings)
    new = {token.text for token in added}
    return with_rows(made, [*origins(request, tokens, new)], multiple, request.findings)


def _owner(
    config: MergeConfig, base: Donor, donors: Sequence[Donor | None], findings: Findings
) -> Donor | None:
    """The model whose tokenizer it is: the base model for `base` and `union`."""
    said = config.tokenizer
    if said in (BASE, UNION, config.base_model):
        return base
    for donor, expert in zip(donors, (*config.experts, *config.shared_experts), strict=True):
        if said in (expert.name, expert.source_model, donor.name if donor else ""):
            return donor
    names = [donor.name for donor in donors if donor]
    what = f"{said!r} is no expert of this config"
    findings.problem(config.where("tokenizer"), what, nearest(said, [BASE, UNION, *names]))
    return None


def _extra(config: MergeConfig, findings: Findings) -> list[Token] | Tokens:
    """The tokens that `extra_tokens` lists, or a whole tokenizer."""
    said, where = config.extra_tokens, config.where("extra_tokens")
    if not isinstance(said, str):
        return _listed(said, where, "item {}", findings) if said else []
    path = next((place for place in places(said, config.folder) if place.is_file()), None)
    if path is None:
        fix = "name a tokenizer.json or a file of one token a line"
        findings.problem(where, f"{said} is no file", fix)
        return []
    try:
        content = path.read_bytes()
        if path.suffix == ".json":
            return parse_tokens(content)
        return _listed(content.decode("utf-8-sig").splitlines(), where, "line {}", findings)
    except OSError as error:
        what = f"{said} cannot be read ({error.strerror})"
        findings.problem(where, what, "check its permissions")
    except UnicodeDecodeError:
        findings.problem(where, f"{said} is not UTF-8 text", "save it as UTF-8, one token a line")
    except ValueError as error:
        fix = "name one that the tokenizers library has written, or a text file"
        findings.problem(where, f"{said}: {error}", fix)
    return []


def _listed(texts: Iterable[str], where: str, place: str, findings: Findings) -> list[Token]:
    seen: dict[str, int] = {}
    for number, text in enumerate(texts, start=1):
        at = place.format(number)
        if not text.strip():
            findings.problem(where, f"{at} is empty", "write a token, or remove it")
        elif text in seen:
            what = f"{at}, {text!r}, is {place.format(seen[text])} too"
            findings.problem(where, what, "keep one of them")
        else:
            seen[text] = number
    if not seen:
        findings.problem(where, "names no token", "add some, or remove it")
    return [Token(text) for text in seen]


def _special_ids(donor: Donor) -> dict[str, Any]:
    return {key: donor.model.config.get(key) for key in _SPECIAL_IDS}
