"""A vocabulary extended, the whole way: SmolLM2 learns Chinese, which it spells in bytes.

    pip install 'moemerge[train]'
    PYTHONPATH=. python examples/extend_vocabulary.py OUT

1. Chinese manual pages (Debian's manpages-zh), some of them held out, and English ones (manpages),
   so that English is not forgotten. They are fetched, their licences are their own (GFDL-1.2+ and
   GPL, BSD and others), and nothing of them is in this repository.
2. A BPE of the Chinese text: the characters and words that save the most are the new tokens.
3. SmolLM2 twice, as an English and a Chinese expert, with these tokens and one expert a token.
4. The new rows of embeddings and head, and a LoRA, trained on both languages, and merged into the
   mixture. The old rows stay: trained too, they all drift, by which English loses.
5. A table: the base, the mixture before training, and after.

Config, texts, tokens, adapter and both mixtures stay in OUT.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

TOOLS = ("apt-get", "dpkg-deb", "groff")
HAN = r"[\u3400-\u9fff]"
HELD_OUT = 0.1  # of the pages
PASSAGES, PASSAGE_CHARACTERS = 20, 300
SHARED_CHARACTERS = 8  # a held-out paragraph may have a tenth of such sequences in common
REPLAY = 5 / 6  # English characters to a Chinese one: a fifth of the tokens

CONFIG = """\
base_model: {base}
extra_tokens: tokens.txt
pad_vocabulary: 64
experts_per_token: 1
gate_mode: ridge
experts:
  - source_model: {base}
    name: english
    positive_prompts: {english}
  - source_model: {base}
    name: chinese
    positive_prompts: {chinese}
"""


def main() -> None:
    """Fetch, merge, train, merge and measure."""
    options = _options()
    out = options.out
    train, held = chinese(options.cache)
    replay = english(options.cache)
    out.mkdir(parents=True)
    _write(out / "chinese.jsonl", train)
    _write(out / "english.jsonl", _excerpts(replay, round(REPLAY * sum(map(len, train)))))
    _write(out / "heldout-chinese.jsonl", held)
    _write(out / "heldout-english.jsonl", _english_heldout())
    tokens = new_tokens(train, options.base / "tokenizer.json", options.tokens)
    (out / "tokens.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    prompts = {"english": _sentences(replay), "chinese": _sentences(train)}
    shown = {name: json.dumps(some, ensure_ascii=False) for name, some in prompts.items()}
    (out / "config.yaml").write_text(CONFIG.format(base=options.base, **shown), encoding="utf-8")

    mixture, adapter, extended = out / "mixture", out / "adapter", out / "extended"
    _moemerge(out / "config.yaml", mixture)
    _moemerge(
        "tune", "lora", mixture, adapter, "--embeddings",
        "--first-row", _vocabulary_size(options.base), "--embedding-rate", options.embedding_rate,
        "--data", out / "chinese.jsonl", "--data", out / "english.jsonl",
        "--steps", options.steps, "--batch", options.batch, "--length", options.length,
        "--learning-rate", options.learning_rate, "--rank", options.rank,
        "--alpha", 2 * options.rank, "--held-out", 0.005, "--no-gradient-checkpointing",
    )  # fmt: skip
    _moemerge("merge-adapter", mixture, adapter, extended)

    models = {"SmolLM2": options.base, "extended": mixture, "extended, trained": extended}
    print("\n" + table(models, out / "heldout-chinese.jsonl", out / "heldout-english.jsonl"))


def chinese(cache: Path) -> tuple[list[str], list[str]]:
    """The Chinese manual pages' prose: pages to train on, and passages of other pages.

    A paragraph that stands in several pages is kept once; a held-out one that shares more than a
    tenth of its sequences of 8 characters with the training text is left out.
    """
    from demo_corpus import manuals

    seen: set[str] = set()
    pages = []
    for page in manuals(["manpages-zh"], cache, "zh_CN").values():
        kept = [line for line in page.splitlines() if _is_chinese(line) and line not in seen]
        seen.update(kept)
        pages.append(kept)
    random.Random(0).shuffle(pages)
    count = round(len(pages) * HELD_OUT)
    train = ["\n".join(page) + "\n" for page in pages[count:] if page]
    known = {part for page in train for part in _sequences(page)}
    passages = []
    for page in pages[:count]:
        new = [line for line in page if 10 * len(known & _sequences(line)) <= len(_sequences(line))]
        if len(passage := "\n".join(new)[:PASSAGE_CHARACTERS]) >= PASSAGE_CHARACTERS / 2:
            passages.append(passage)
    return train, passages[:PASSAGES]


def english(cache: Path) -> list[str]:
    """The English manual pages' prose."""
    from demo_corpus import ENGLISH_WORDS, manuals

    pages = [
        [line for line in page.splitlines() if len(line) > 60 and re.search(ENGLISH_WORDS, line)]
        for page in manuals(["manpages"], cache, "").values()
    ]
    return ["\n".join(page) + "\n" for page in pages if page]


def new_tokens(texts: list[str], tokenizer: Path, count: int) -> list[str]:
    """The `count` Chinese pieces that save the most tokens, of those that a BPE of the texts finds.

    Few and frequent ones: each must be learnt from scratch, and is met often.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import Split
    from tokenizers.trainers import BpeTrainer

    old, new = Tokenizer.from_file(str(tokenizer)), Tokenizer(BPE())
    new.pre_tokenizer = Split(Regex(f"{HAN}+"), "removed", invert=True)
    trainer = BpeTrainer(vocab_size=5 * count, max_token_length=4, show_progress=False)
    new.train_from_iterator(texts, trainer)
    found = Counter(token for read in new.encode_batch(texts) for token in read.tokens)
    saved = {text: times * (len(old.encode(text).ids) - 1) for text, times in found.items()}
    return [text for text, _ in Counter(saved).most_common(count)]


def table(models: dict[str, Path], new: Path, old: Path) -> str:
    """Tokens and loss (nats) a character of the new language, and loss a token of the old one."""
    from transformers import AutoModelForCausalLM

    from moemerge import Silent
    from moemerge.evaluation.loss import counted, mean_loss, passages_of
    from moemerge.text.documents import texts_of
    from moemerge.text.encoder import Encoder

    heads = ("", "Chinese: tokens a character", "nats a character", "English: nats a token")
    lines = [heads, ("---",) * len(heads)]
    characters = sum(map(len, texts_of(new)))
    for name, directory in models.items():
        model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        encoder = Encoder(directory)
        both = [passages_of(path.stem, path, encoder, 1024) for path in (new, old)]
        density = counted(both[0]) / characters
        losses = [mean_loss(model, passages, Silent(), name) for passages in both]
        numbers = (density, density * losses[0], losses[1])
        lines.append((name, *(f"{number:.3f}" for number in numbers)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Needs moemerge[train], and Debian or a relative (apt-get download, groff).",
    )
    parser.add_argument("out", type=Path, help="a new directory for all that is made")
    parser.add_argument("--tokens", type=int, default=400, help="new tokens")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the LoRA")
    parser.add_argument("--embedding-rate", type=float, default=5e-3, help="of the new rows")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    options = parser.parse_args()
    if missing := [tool for tool in TOOLS if not shutil.which(tool)]:
        parser.error(f"{', '.join(missing)} not found: run it on Debian or a relative")
    if options.out.exists():
        parser.error(f"{options.out} is there already: name a new directory")
    from smollm2 import model_dir

    options.base = model_dir()
    options.cache = options.base.parent / "demo-corpus"
    return options


def _moemerge(*arguments: object) -> None:
    """Run a command of moemerge and show it."""
    command = [str(argument) for argument in arguments]
    print("$ moemerge " + " ".join(command), flush=True)
    done = subprocess.run([sys.executable, "-m", "moemerge", *command])
    if done.returncode:
        sys.exit(done.returncode)


def _vocabulary_size(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text("utf-8"))["vocab_size"])


def _is_chinese(line: str) -> bool:
    return len(line) >= 20 and 2 * len(re.findall(HAN, line)) >= len(line)


def _sequences(text: str) -> set[str]:
    return {text[at : at + SHARED_CHARACTERS] for at in range(len(text) - SHARED_CHARACTERS + 1)}


def _english_heldout() -> list[str]:
    """The English prose of examples/heldout: novels, dictionaries, licences."""
    rows = [
        json.loads(line)
        for name in ("other", "legal")
        for line in (ROOT / f"examples/heldout/{name}.jsonl").read_text("utf-8").splitlines()
    ]
    return [row["text"] for row in rows if not re.search("German|click", row["source"])]


def _excerpts(pages: list[str], characters: int) -> list[str]:
    """An equal part of every page, of about so many characters together."""
    each = characters // len(pages)
    return [page[:each] for page in pages]


def _sentences(pages: list[str]) -> list[str]:
    """Five paragraphs, of as many pages."""
    return [page.splitlines()[0][:200] for page in random.Random(0).sample(pages, 5)]


def _write(path: Path, texts: Iterable[str]) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
