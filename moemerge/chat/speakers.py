"""Mixtures that answer: a directory in transformers, a GGUF file in llama.cpp."""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moemerge.architectures import COUNTS
from moemerge.chat.answers import Answers, Asked, Piece, Turns
from moemerge.checkpoint import INSTALL
from moemerge.errors import Findings, InputError, Problem, RunError, first_line
from moemerge.evaluation import router_logits
from moemerge.files import GGUF_SUFFIX
from moemerge.gates import check_device_is_here
from moemerge.mixture import config_of, load_mixture, portions
from moemerge.options import RunOptions
from moemerge.output import manifest_of
from moemerge.reporting import Reporter


def open_speaker(out: Path, options: RunOptions, reporter: Reporter) -> Answers:
    """Load a mixture to talk with.

    Raises:
        InputError: it cannot be loaded.
    """
    return Gguf(out, reporter) if out.suffix == GGUF_SUFFIX else Loaded(out, options, reporter)


class Loaded:
    """A directory in transformers; it tells which expert comes first for each token."""

    def __init__(self, out: Path, options: RunOptions, reporter: Reporter):
        findings = Findings()
        check_device_is_here(options, findings)
        manifest, config = manifest_of(out, "talk with"), config_of(out)
        count = next(int(config[key]) for key in COUNTS if key in config)
        self.segments, _ = portions(config, manifest, count, 1, str(out), findings)
        findings.refuse()
        names = tuple(f"expert {number}" for number in range(count // self.segments))
        self.experts: Sequence[str] = manifest.plan.experts if manifest else names
        self.model = load_mixture(out, options, reporter)
        import transformers

        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        except Exception as error:  # errors of many libraries reach this line
            what = f"its tokenizer cannot be read ({first_line(error)})"
            raise InputError([Problem(str(out), what, "copy the base's tokenizer")]) from error

    def answer(self, turns: Turns, asked: Asked) -> Iterator[Piece]:
        """The answer, token by token; a piece ends with a whole character."""
        import torch

        ids = self._encoded(turns)
        draws = torch.Generator().manual_seed(asked.seed)
        ends, made, before, owners = self._ends(), list[int](), "", list[int]()
        past, step = None, torch.tensor([ids], device=self.model.device)
        for _ in range(asked.tokens):
            seen: list[Any] = []
            with torch.inference_mode(), router_logits(self.model, seen):
                out = self.model(input_ids=step, past_key_values=past, use_cache=True)
            past = out.past_key_values
            if made:  # the routers have now seen the token before
                owners.append(self._first(seen, asked.layer))
                now = self.tokenizer.decode(made, skip_special_tokens=True)
                if not now.endswith("\ufffd"):
                    yield Piece(now[len(before) :], owners[-1])
                    before = now
            token = _drawn(out.logits[0, -1].float().cpu(), asked, draws)
            if token in ends:
                return
            made.append(token)
            step = torch.tensor([[token]], device=self.model.device)
        now = self.tokenizer.decode(made, skip_special_tokens=True)
        yield Piece(now[len(before) :], owners[-1] if owners else None)

    def _encoded(self, turns: Turns) -> list[int]:
        """The conversation in the chat template; without one, the texts alone."""
        if not self.tokenizer.chat_template:
            text = "\n".join(turn["content"] for turn in turns)
            return list(self.tokenizer(text).input_ids)
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _ends(self) -> set[int]:
        told = self.model.generation_config.eos_token_id
        found = told if isinstance(told, list) else [told, self.tokenizer.eos_token_id]
        return {one for one in found if one is not None}

    def _first(self, seen: list[Any], layer: int | None) -> int:
        """The expert that comes first for the last token, in a layer or in the mean of all."""
        import torch

        rows = torch.stack([one[-1] for one in seen])[:, :: self.segments].softmax(-1)
        return int((rows.mean(0) if layer is None else rows[layer]).argmax())

    @property
    def layers(self) -> int:
        """The number of its layers."""
        return int(self.model.config.get_text_config().num_hidden_layers)


def _drawn(logits: Any, asked: Asked, draws: Any) -> int:
    """The next token."""
    import torch

    if asked.temperature == 0:
        return int(logits.argmax())
    if asked.top_k:
        least = logits.topk(min(asked.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    chances = (logits / asked.temperature).softmax(-1)
    return int(torch.multinomial(chances, 1, generator=draws))


class Gguf:
    """A GGUF file in llama.cpp's server, which the `xllamacpp` package runs in this process.

    It does not tell which expert spoke.
    """

    experts: Sequence[str] = ()

    def __init__(self, out: Path, reporter: Reporter):
        if not out.is_file():
            raise InputError([Problem(str(out), "there is no such file", "check the path")])
        if importlib.util.find_spec("xllamacpp") is None:
            raise InputError([Problem(str(out), "llama.cpp is not installed", INSTALL)])
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path = str(out)
        asked.n_parallel, asked.warmup, asked.verbosity = 1, False, -1
        try:
            with reporter.progress("loading the file", 1, "model"), _silent():
                self.server = xllamacpp.Server(asked)
        except RuntimeError as error:
            fix = "name one that llama.cpp loads; `moemerge verify` checks one that moemerge made"
            raise InputError([Problem(str(out), "llama.cpp cannot load it", fix)]) from error

    def answer(self, turns: Turns, asked: Asked) -> Iterator[Piece]:
        """The answer as llama.cpp streams it."""
        request = {
            "messages": turns, "max_tokens": asked.tokens, "temperature": asked.temperature,
            "top_k": asked.top_k, "seed": asked.seed, "stream": True,
        }  # fmt: skip
        said: queue.Queue[Any] = queue.Queue()
        stopped = threading.Event()

        def hear(chunk: Any) -> bool:
            said.put(chunk)
            return stopped.is_set()

        def run() -> None:
            try:
                self.server.handle_chat_completions(request, hear)
                said.put(None)
            except Exception as error:  # it is raised again where the answer is read
                said.put(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            while (chunk := said.get()) is not None:
                if isinstance(chunk, Exception):
                    raise RunError(f"llama.cpp: {first_line(chunk)}")
                if "error" in chunk:
                    raise RunError(f"llama.cpp: {chunk['error'].get('message')}")
                for choice in chunk.get("choices", ()):
                    if text := choice.get("delta", {}).get("content"):
                        yield Piece(text)
        finally:
            stopped.set()


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what llama.cpp writes to the error stream."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
