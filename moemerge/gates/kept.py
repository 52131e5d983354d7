"""What a ridge fit saw, kept in a file beside a mixture: the router inputs of every text.

An expert can then be added later without the others' texts, and all rows are solved anew. The file
holds no text, but router inputs can give their text away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.checkpoint import Donor, Location, read_header, read_values
from moemerge.dense import Body, Passage, router_inputs
from moemerge.errors import Findings
from moemerge.files import STATISTICS_FILE
from moemerge.gates.fitting import solved
from moemerge.gates.task import Example
from moemerge.options import RunOptions
from moemerge.plan import Fill, PlannedTensor, Sources, file_header
from moemerge.reporting import Reporter
from moemerge.text import PIECE_TOKENS, Encoder, Prompt, documents_of

if TYPE_CHECKING:
    import numpy as np

    Matrix = np.ndarray[Any, np.dtype[np.float32]]

_WARNING = "Made of the texts that the routers were fitted to; it can give them away."


class Keeper:
    """Writes the file while a fit runs, layer by layer.

    `settings` are those of the fit, to be used again.
    """

    def __init__(self, path: Path, layers: int, hidden: int, settings: dict[str, Any]):
        self.path, self.layers, self.hidden, self.settings = path, layers, hidden, settings
        self.done = 0

    def __call__(self, examples: Sequence[Example], layer: Sequence[Matrix]) -> None:
        """Keep the inputs (T, D) of each text at the next layer."""
        import numpy as np

        if not self.done:
            self._begin(examples)
        with self.path.open("ab") as file:
            for matrix in layer:
                file.write(np.ascontiguousarray(matrix, "<f4").tobytes())
        self.done += 1

    def _begin(self, examples: Sequence[Example]) -> None:
        tokens = [len(one.prompt.ids) - one.prompt.own for one in examples]
        shape, none = (sum(tokens), self.hidden), Fill(0.0, ())
        tensors = [PlannedTensor(_name(n), shape, "F32", none) for n in range(self.layers)]
        told = {
            "tokens": tokens,
            "expert": [one.expert for one in examples],
            "positive": [one.positive for one in examples],
            "settings": self.settings,
        }
        head = {"moemerge": json.dumps(told), "about": _WARNING}
        self.path.write_bytes(file_header(tensors, head))


class Kept:
    """The file, opened.

    Raises:
        ValueError: it is damaged, or no such file; says why.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path):
        self.places: dict[str, Location] = read_header(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            told = json.loads(json.loads(file.read(length))["__metadata__"]["moemerge"])
        self.tokens = [int(one) for one in told["tokens"]]
        self.settings = dict(told["settings"])
        pairs = zip(told["expert"], told["positive"], strict=True)
        none = Prompt((0,), 0)
        self.examples = [Example(none, int(expert), bool(positive)) for expert, positive in pairs]
        wanted = {_name(n): sum(self.tokens) for n in range(len(self.places))}
        if {name: at.shape[0] for name, at in self.places.items()} != wanted or len(
            self.tokens
        ) != len(self.examples):
            raise ValueError("its tensors are not those of its texts")

    def layers(self) -> Iterator[list[Matrix]]:
        """The inputs (T, D) of each text, layer by layer."""
        import numpy as np

        ends = np.cumsum(self.tokens)
        for number in range(len(self.places)):
            at = self.places[_name(number)]
            whole = read_values(at, 0, at.shape[0] * at.shape[1]).reshape(at.shape)
            yield np.split(whole.astype(np.float32), ends[:-1])


def kept_in(
    directory: Path, where: str, size: tuple[int, int, int], findings: Findings
) -> Kept | None:
    """What the merge of a mixture kept; None, with a problem, if that is nothing.

    `size` is the mixture's layers, width and experts.
    """
    path = directory / STATISTICS_FILE
    fix = "leave out --text, then `moemerge regate` with all texts; or merge with --statistics"
    if path.is_file():
        try:
            found = Kept(path)
            widths = {at.shape[1] for at in found.places.values()}
            experts = max((one.expert for one in found.examples), default=-1) + 1
            if [(len(found.places), width, experts) for width in widths] == [size]:
                return found
            findings.problem(str(path), "is not of this mixture", fix)
        except (OSError, ValueError, KeyError, TypeError) as error:
            findings.problem(str(path), f"is damaged ({error})", fix)
    else:
        findings.problem(where, f"has no {STATISTICS_FILE}", fix)
    return None


def texts_in(named: str, directory: Path, limit: int, findings: Findings) -> tuple[Prompt, ...]:
    """A new expert's text in pieces, as `calibration:` is read, by the tokenizer in `directory`."""
    found: tuple[Prompt, ...] = ()
    try:
        pieces = Encoder(directory).pieces
        found = pieces(documents_of(named, None), min(PIECE_TOKENS, limit))
        why = "" if found else f"{named} holds no text"
    except ValueError as error:
        why = str(error)
    if why:
        findings.problem("--text", why, "name a text or jsonl file, or a directory")
    return found


def with_expert(
    kept: Kept,
    body: Body,
    donor: Donor,
    texts: Sequence[Prompt],
    sources: Sources,
    options: RunOptions,
    reporter: Reporter,
) -> list[Matrix]:
    """Routers (E + 1, D), layer by layer, by the same fit as the merge's.

    The new expert's texts pass the mixture's body and its own MLPs.

    Raises:
        ValueError: what was kept does not fit the body.
    """
    passages = [Passage(text, donor) for text in texts]
    read = router_inputs(body, sources, passages, options, reporter)
    number = max(one.expert for one in kept.examples) + 1
    examples = [*kept.examples, *(Example(text, number) for text in texts)]
    own = kept.settings
    layers = ([*old, *new] for old, new in zip(kept.layers(), read, strict=True))
    return solved(layers, examples, number + 1, own.get("lambda_"), float(own["kappa"])).matrices


def _name(layer: int) -> str:
    return f"layers.{layer}.router_inputs"
