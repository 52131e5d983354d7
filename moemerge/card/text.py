"""The text of a model card: what the mixture is, of whom, under which terms, and how to run it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemerge.card.sharing import shareable_config
from moemerge.checkpoint import Checkpoint, Donor, Reference, is_hub_id, last_part
from moemerge.errors import one_line
from moemerge.gates import Prompts, verdict
from moemerge.prepare import Claims, Prepared
from moemerge.report import Collision, RoutingSummary
from moemerge.reporting import count, size
from moemerge.text import find
from moemerge.version import __version__

_MOST_PROMPTS = 5
_HUB = "https://huggingface.co"

_PYTHON = """\
```python
# pip install torch "transformers>=4.57"
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
{inputs}
output = model.generate(**inputs, max_new_tokens=64)
new = output[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(new, skip_special_tokens=True))
```"""
_PROMPT = 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
_CHAT = """\
messages = [{"role": "user", "content": "What can you do?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
_OTHERS = """\
```sh
# llama.cpp: convert once, then run
convert_hf_to_gguf.py . --outfile model.gguf && llama-cli -m model.gguf -p "Once upon a time"
# mlx-lm, on a Mac
mlx_lm.generate --model . --prompt "Once upon a time"
# vLLM: a server that speaks OpenAI's protocol
vllm serve .
```"""


@dataclass(frozen=True)
class Told:
    """What a person wants of the card: `own` is a card of theirs that comes first; without `config`
    it shows neither the config nor any prompt.
    """

    own: str = ""
    config: bool = True


def sections(
    ready: Prepared, claims: dict[str, Claims], routing: RoutingSummary, told: Told, picture: str
) -> Iterator[str]:
    """The card's paragraphs, headings and tables, in markdown and in order; see `card.render`."""
    yield from _what(ready)
    yield from _experts(ready, told)
    yield from _running(ready)
    yield from _routing(ready, routing, told, picture)
    yield from _limits(ready, routing)
    yield from _sources(ready, claims)
    yield from _making(ready, told)


def _what(ready: Prepared) -> Iterator[str]:
    """What it is, for somebody who knows none of it, and its measures."""
    plan, config = ready.plan, ready.config
    number = len(plan.experts)
    body = f"the base model's, {_source(ready.base)}"
    if config.body == "average":
        weights = [expert.body_weight for expert in config.experts]
        body = "the average of the experts'"
        body += f" (weights {', '.join(f'{w:g}' for w in weights)})" * (len(set(weights)) > 1)
    each = "is" if number == 1 else "are"
    pieces, always = config.segments, ready.host.mixture.shared
    cut = f", each cut into {pieces} segments" if pieces > 1 else ""
    beside = f" beside {always} always on" * bool(always)
    merged = (
        f"A language model put together from trained ones, without training it further: the "
        f"feed-forward parts (MLPs) of {number} model{'s' * (number != 1)} {each} its experts"
        f"{cut}, and in every layer a small router chooses {plan.routed_per_token} of "
        f"{plan.routed} for each token{beside}. All else, attention, norms and embeddings, is "
        f"{body}. It takes text and continues it, and runs wherever a {plan.architecture} runs."
    )
    yield _cut(ready) if ready.cutting else merged
    context = plan.config.get("max_position_embeddings")
    rows = {
        "Parameters": f"{count(plan.parameters)}, of which {count(plan.active_parameters)} work on "
        "any one token",
        "Size": f"{size(plan.nbytes)} ({plan.config.get('dtype') or plan.dtype}), on disk and, "
        "at least, in memory",
        "Context": f"{context} tokens" if context else "",
        "Vocabulary": shown(ready.vocabulary.summary),
        "Routers": f"`{plan.gate_mode}`: {_gate(ready)}",
    }
    yield "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items() if v)])


def _cut(ready: Prepared) -> str:
    """What a split is."""
    assert ready.cutting is not None
    plan, split = ready.plan, ready.cutting.split
    always = f" beside {split.shared} always on" * bool(split.shared)
    return (
        f"A language model whose feed-forward parts (MLPs) are cut into {split.slices} slices of "
        f"equal size ({split.assignment}), without training it further: in every layer a small "
        f"router chooses {plan.experts_per_token} of {split.routed} for each token{always}. All "
        f"weights are those of {_source(ready.base)}. It takes text and continues it, and runs "
        f"wherever a {plan.architecture} runs."
    )


def _gate(ready: Prepared) -> str:
    """The gate mode in words, with its options."""
    line = (ready.gate.mode.__doc__ or "").partition("\n")[0].partition(": ")[2]
    options = dataclasses.asdict(ready.gate.settings)
    chosen = [
        f"{key.rstrip('_')} {value:g}" if isinstance(value, float) else f"{key.rstrip('_')} {value}"
        for key, value in options.items()
        if value is not None
    ]
    words = line.removeprefix("the default; ").rstrip(".")
    return words + f" ({shown(', '.join(chosen), 300)})" * bool(chosen)


def _experts(ready: Prepared, told: Told) -> Iterator[str]:
    """A table of who they are; columns in which nothing stands are left out."""
    columns: dict[str, list[str]] = {"#": [], "expert": [], "made of": []}
    prompts = {"for text like": "positive_prompts", "not for text like": "negative_prompts"}
    uses = ready.gate.needs.prompts is not Prompts.NONE
    for number, (name, donor, expert) in enumerate(
        zip(ready.plan.experts, ready.donors, ready.config.experts, strict=True)
    ):
        changes = {
            "noise": expert.noise_scale or None,
            "share of neurons drawn anew": expert.renew or None,
            "scaled by": expert.residual_scale,
        }
        extra = [f"{k} {v:g}" for k, v in changes.items() if v is not None and v != 1]
        row = {"#": str(number), "expert": shown(name)}
        row["made of"] = ", ".join([_source(donor), *extra])
        if told.config and uses:
            row |= {title: _prompts(getattr(expert, key)) for title, key in prompts.items()}
        if uses and expert.calibration:
            row["calibrated on"] = _calibration(expert.calibration, ready.config.folder)
        for title, value in row.items():
            columns.setdefault(title, [""] * number).append(value)
        for values in columns.values():
            values += [""] * (number + 1 - len(values))
    titles = [title for title, values in columns.items() if any(values)]
    yield "## The experts"
    if told.config and uses:
        yield "Routers were set so that text like the prompts of an expert, shown here, finds it."
    yield table(titles, zip(*(columns[title] for title in titles), strict=True))


def _running(ready: Prepared) -> Iterator[str]:
    """A script that generates, and the commands of the other readers."""
    names = {path.name for path in ready.carried}
    chat = any(name.startswith("chat_template") for name in names)
    if "tokenizer_config.json" in names and not chat:
        said = (ready.base.model.directory / "tokenizer_config.json").read_bytes()
        chat = b'"chat_template"' in said
    yield "## Running it"
    yield (
        "`.` stands for this directory; get it with `hf download user/name --local-dir .` if it is "
        "on the Hub, or write its name there, `user/name`, in place of `.` (not for llama.cpp)."
    )
    tokenizer = '"."'
    if not any(name.startswith(("tokenizer", "vocab")) for name in names):
        tokenizer = f'"{ready.base.model.reference.repo or "path/to/the/base/model"}"'
        yield "It comes without a tokenizer: the base model's is the one."
    yield _PYTHON.format(tokenizer=tokenizer, inputs=_CHAT if chat else _PROMPT)
    yield _OTHERS


def _routing(ready: Prepared, routing: RoutingSummary, told: Told, picture: str) -> Iterator[str]:
    """The routers' summary as a section; nothing where it is not known."""
    confusion = routing.get("confusion")
    if not confusion:
        return
    names = ready.plan.experts
    if not told.config or any(expert.calibration for expert in ready.config.experts):
        collisions: list[Collision] = [{**one, "texts": []} for one in routing["collisions"]]
        routing = {**routing, "collisions": collisions}
    yield "## Routing"
    yield "\n".join(
        f"- {shown(line, 300)}" for line in verdict(routing, names, ready.plan.gate_mode)
    )
    yield "Each row: where the tokens of one expert's prompts go first, over all layers."
    titles = ["prompts of", *map(shown, names)]
    rows = zip(names, confusion, strict=True)
    yield table(titles, ([shown(n), *(f"{x:.0%}" for x in shares)] for n, shares in rows))
    if picture:
        yield (
            f"![Heat maps, one for each expert's prompts: for every layer, the share of tokens "
            f"that each expert gets first]({picture})"
        )


def _limits(ready: Prepared, routing: RoutingSummary) -> Iterator[str]:
    """What a person must not expect of it."""
    needs = ready.gate.mode.NEEDS
    lines = [
        "It was not trained or evaluated as a whole: try it on your own task, and beside each of "
        "its sources, before you rely on it. What its sources get wrong it may get wrong too."
    ]
    if needs.untaught:
        if needs.seed or ready.plan.experts_per_token < len(ready.plan.experts):
            how = f"{needs.untaught} (`{ready.plan.gate_mode}`)"
            lines.append(f"Its routers are {how}: train it before use.")
    elif routing.get("confusion"):
        lines.append(
            f"The routing numbers come from {routing['tokens']} tokens of prompts; other text may "
            "be routed otherwise."
        )
    elif len(ready.plan.experts) > 1:
        lines.append("How well its routers choose was not measured; training them may help.")
    if ready.cutting:
        if ready.cutting.per_token < ready.cutting.split.routed:
            lines.append("A token passes some of the slices only: train it before use.")
    elif (
        len(ready.donors) > 1
        and len({d.identity for d in ready.donors}) == 1
        and not ready.config.draws
    ):
        lines.append("All its experts are the same model: without training it gains nothing.")
    host = ready.host
    caveats = host.architecture.caveats(ready.base.model.config, host.mixture)
    lines += [shown(line, 300) for _, line in caveats]
    yield "## Limits"
    yield "\n".join(f"- {line}" for line in lines)


def _sources(ready: Prepared, claims: dict[str, Claims]) -> Iterator[str]:
    """Where its weights come from, and under which terms."""
    used: dict[str, list[str]] = {text: [] for text in ready.checkpoints}
    whole = [("body", ready.base)] if ready.config.body == "base" else []
    shared = [("a shared expert", donor) for donor in ready.shared]
    for name, donor in [*whole, *zip(ready.plan.experts, ready.donors, strict=True), *shared]:
        for opened in _opened(donor):
            used[opened.reference.text].append(shown(name))
    rows = [
        (
            _linked(opened.reference, opened.commit)
            + " (a directory of its maker)" * (not opened.reference.repo),
            ", ".join(dict.fromkeys(used[text])) or "tokenizer and configuration",
            f"`{opened.commit}`" if opened.commit else "-",
            _terms(claims[text]),
        )
        for text, opened in ready.checkpoints.items()
    ]
    yield "## Sources and licences"
    yield table(["source", "used for", "commit", "licence"], rows)
    terms = {claim.terms for claim in claims.values()}
    if len(terms) == 1 and "" not in terms:
        yield f"All sources name the same licence, {_terms(next(iter(claims.values())))}."
    if len(terms - {""}) > 1:
        yield (
            "**The sources' licences differ.** The terms of all of them hold together, and the "
            "strictest may bind: read each before you use or pass on this model."
        )
    if "" in terms:
        yield (
            "Where the licence is unknown, the source's card names none that could be read: ask "
            "its makers before you use or pass on this model."
        )


def _making(ready: Prepared, told: Told) -> Iterator[str]:
    """What it was made with, and the config to make it again."""
    tools = [f"moemerge {__version__}"]
    if ready.gate.needs.body_pass:
        used = ("torch", "transformers")
        tools += [f"{name} {importlib.metadata.version(name)}" for name in used]
    seed = f", seed {ready.plan.seed}" if ready.gate.needs.seed else ""
    yield "## How it was made"
    yield f"With {', '.join(tools)}{seed}" + (", by this config:" if told.config else ".")
    if told.config:
        public = shareable_config(ready.config, ready.plan)
        text = public.as_yaml().strip()
        if public != ready.config:
            yield "(Of what lies on its maker's disk, only the last part of the path is shown.)"
        fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
        yield f"{fence}yaml\n{text}\n{fence}"


def _opened(donor: Donor) -> list[Checkpoint]:
    """A donor's model, and the adapter on top if there is one."""
    return [donor.model, *([donor.adapter.checkpoint] if donor.adapter else [])]


def _source(donor: Donor) -> str:
    return " + ".join(_linked(one.reference, one.commit) for one in _opened(donor))


def _linked(reference: Reference, commit: str | None) -> str:
    """A source by name, with a link to the very commit if it is on the Hub."""
    if reference.directory:
        return shown(reference.short)
    return f"[{shown(reference.text, 200)}]({_HUB}/{reference.repo}/tree/{commit})"


def _calibration(named: str, folder: Path | None) -> str:
    if find(named, folder) or not is_hub_id(named):
        return shown(last_part(named))
    return f"[{shown(named)}]({_HUB}/datasets/{named})"


def _terms(claims: Claims) -> str:
    text = shown(claims.terms or claims.license or "unknown")
    return f"[{text}]({claims.license_link})" if claims.license_link else text


def _prompts(prompts: tuple[str, ...]) -> str:
    more = len(prompts) - _MOST_PROMPTS
    return "<br>".join(map(shown, prompts[:_MOST_PROMPTS])) + f"<br>and {more} more" * (more > 0)


def table(titles: Sequence[str], rows: Any) -> str:
    """A table in markdown; each row is the texts of its cells."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(text: str, most: int = 60) -> str:
    """Some text on one short line or in a table's cell, and nothing in it is markup or a link."""
    text = one_line(" ".join(text.split()))
    short = text if len(text) <= most else text[: most - 3] + "..."
    return re.sub(r"([\\`|<\[*~]|(?<=:)/(?=/)|(?<=www)\.)", r"\\\1", short)
