"""The small files that a mixture takes over from a model: its tokenizer and generation config."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moemerge.errors import Findings, ReadError
from moemerge.text import Vocabulary
from moemerge.tokenizer import GENERATION_FILE, TOKENIZER_FILE, portable

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def carried_files(vocabulary: Vocabulary, copy_tokenizer: bool) -> tuple[Path, ...]:
    """The small files to copy, relative to their model: generation config and tokenizer."""
    directory, names = vocabulary.directory, [Path(GENERATION_FILE)]
    if copy_tokenizer:
        names += map(Path, TOKENIZER_FILES)
        extra = directory / "additional_chat_templates"
        names += sorted(path.relative_to(directory) for path in extra.glob("*.jinja"))
    written = vocabulary.written
    return tuple(n for n in names if n.as_posix() in written or (directory / n).is_file())


def check_carried(
    vocabulary: Vocabulary, carried: Sequence[Path], where: str, findings: Findings
) -> None:
    """Record a problem for each file that cannot be read, and a note for each change to a file."""
    for name in carried:
        try:
            _, notes = _content(vocabulary, name, carried)
        except OSError:
            path = vocabulary.directory / name
            findings.problem(where, f"{path} cannot be read", "check its permissions")
            continue
        for note in notes:
            findings.note(note)


def carried_content(vocabulary: Vocabulary, carried: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """A model's small files by name, as they are to be written.

    They are copied byte for byte, except where tokens are added to the tokenizer, or where
    transformers or llama.cpp could not read a file as it is.

    Raises:
        ReadError: a file cannot be read any more.
    """
    for name in carried:
        path = vocabulary.directory / name
        try:
            content, _ = _content(vocabulary, name, carried)
        except OSError as error:
            raise ReadError(f"{path}: cannot be read ({error.strerror})") from error
        yield name.as_posix(), content


def _content(
    vocabulary: Vocabulary, name: Path, carried: Sequence[Path]
) -> tuple[bytes, list[str]]:
    """The bytes of a small file in the output, and a note for each change."""
    own = vocabulary.written.get(name.as_posix())
    content = (vocabulary.directory / name).read_bytes() if own is None else own
    rows = int(vocabulary.speaker.model.config["vocab_size"])
    return portable(name.as_posix(), content, Path(TOKENIZER_FILE) in carried, rows)
