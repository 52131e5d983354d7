"""The owner's tokenizer with the tokens and the chat template that the config adds to it."""

from __future__ import annotations

from moemerge.checkpoint import Donor
from moemerge.text.donor_tokens import Request, UnknownTokensError
from moemerge.tokenizer import (
    GENERATION_FILE,
    Token,
    Tokens,
    chat_template,
    cut_by,
    missing,
    read_object,
    shown,
    unknown_to_converter,
    unreadable,
    with_added,
    with_template,
)


def extended(request: Request, extra: list[Token] | Tokens) -> tuple[Tokens, list[Token]]:
    """The owner's tokenizer with the tokens that the config adds, and the list of these.

    A piece of another tokenizer is added only if its text is then read as one token, and if it
    cuts no token that the tokenizer had before. What is added and left out is noted.

    Raises:
        UnknownTokensError: a tokenizer cannot be read, or nothing can be added to it.
    """
    tokens, findings = request.tokens_of(request.owner), request.findings
    others = [request.tokens_of(donor) for donor in request.experts] if request.is_union else []
    wanted: dict[str, Token] = {}
    optional: set[str] = set()
    unfit: set[bytes] = set()
    for other in [*others, *([extra] if isinstance(extra, Tokens) else [])]:
        theirs, left = missing(tokens, other)
        new = {token.text: token for token in theirs if token.text not in wanted}
        optional |= new.keys() - other.added.keys()
        wanted |= new
        unfit |= left
    named = {} if isinstance(extra, Tokens) else {token.text: token for token in extra}
    there = [text for text in named if tokens.has(text)]
    if there:
        line = f"extra_tokens: {len(there)} are in the tokenizer already ({shown(there)})"
        findings.note(line)
    wanted |= {text: named[text] for text in named if text not in {*there, *wanted}}
    try:
        made, kept = _sound(tokens, wanted, optional - named.keys())
        cut = cut_by(tokens, made) if kept else {}
    except ValueError as error:
        raise UnknownTokensError(request.owner, str(error)) from error
    lost = wanted.keys() - {token.text for token in kept}
    if wrong := sorted(lost & named.keys()):
        what = f"{len(wrong)} cannot be tokens of this tokenizer ({shown(wrong)})"
        fix = "remove them: it does not read them as one token, or shows them as other text"
        findings.problem(request.config.where("extra_tokens"), what, fix)
    _note_added(request, kept, len(unfit) + len(lost - named.keys()), list(cut))
    if unknown := unknown_to_converter(tokens, kept):
        findings.note(
            "llama.cpp's converter will not know the tokenizer, by how it reads a test text: "
            f"{len(unknown)} of the added tokens are in that ({shown(unknown)})"
        )
    return made, kept


def _note_added(request: Request, added: list[Token], left: int, cut: list[str]) -> None:
    note = request.findings.note
    if added:
        special = sum(token.special for token in added)
        names = shown(token.text for token in added)
        note(f"tokenizer: {len(added)} tokens are added, {special} of them special: {names}")
    elif request.is_union:
        note("tokenizer: union adds nothing: the base model's has every token")
    if left:
        note(
            f"tokenizer: {left} pieces of other tokenizers are left out: parts of characters, "
            "or what would cut tokens that were there"
        )
    if cut:
        note(f"tokenizer: {len(cut)} tokens are now read in parts ({shown(cut)})")


def _sound(
    tokens: Tokens, wanted: dict[str, Token], optional: set[str]
) -> tuple[Tokens, list[Token]]:
    """The tokenizer with the `wanted` tokens that can be added, and the list of these.

    A token is left out if it is not read as one token and shown as its text. An `optional` token
    is left out also if it cuts a token that the tokenizer had before.

    Raises:
        ValueError: nothing can be added to the tokenizer.
    """
    kept = [token for text, token in wanted.items() if text not in tokens.ids]
    while True:
        made = with_added(tokens, kept)
        lost = set(unreadable(made, kept))
        cut = cut_by(tokens, made) if optional else {}
        lost |= optional.intersection(text for found in cut.values() for text in found)
        if not lost:
            return made, kept
        kept = [token for token in kept if token.text not in lost]


def with_template_of_an_expert(
    request: Request, written: dict[str, bytes], tokens: Tokens
) -> dict[str, bytes]:
    """The `written` files, with the chat template of the first expert that has one.

    They are unchanged if the base model has a chat template, or no expert has one.

    Raises:
        ValueError: the tokenizer's files cannot take a chat template.
    """
    directory = request.base.model.directory
    if chat_template(directory):
        return written
    for donor in request.experts:
        if template := chat_template(donor.model.directory):
            request.findings.note(f"the chat template is {donor.name}'s: the base model has none")
            theirs = request.tokens_of(donor)
            ends = [_id_of(tokens, theirs, number) for number in _ends(donor)]
            found = [number for number in ends if number is not None]
            return with_template(directory, written, template, found)
    return written


def _id_of(tokens: Tokens, theirs: Tokens, number: int) -> int | None:
    names = [token for token, its in theirs.ids.items() if its == number]
    return tokens.find(theirs, names[0]) if names else None


def _ends(donor: Donor) -> list[int]:
    """The ids of the tokens that end a text that the model generates."""
    said = read_object(donor.model.directory / GENERATION_FILE).get("eos_token_id")
    said = donor.model.config.get("eos_token_id") if said is None else said
    return [
        number for number in (said if isinstance(said, list) else [said]) if type(number) is int
    ]
