"""Train demo experts: four LoRA adapters of SmolLM2-135M on four clearly different kinds of text.

For each domain of `demo_corpus` (c, french, legal, sql) this trains an ordinary PEFT adapter (rank
8, all seven linears) on the CPU, writes held-out passages of the domain, and prints a table of
held-out perplexities: the base and every expert on every domain. All of it is seeded.

    python scripts/train_demo_experts.py                # train, write examples/, print the table
    python scripts/train_demo_experts.py --table-only   # score the adapters that are there
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from demo_corpus import DOMAINS, documents
from demo_heldout import choose, write
from peft import LoraConfig, PeftModel, get_peft_model
from smollm2 import model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEPARATOR = "<|endoftext|>"  # stood before every document in pre-training
SEQUENCE_TOKENS = 256
PIECE_CHARACTERS = 3000  # long documents are cut into pieces of about this size


def main() -> None:
    options = _options()
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_dir())
    experts, heldout = options.out / "experts", options.out / "heldout"
    minutes = {}
    for domain in [] if options.table_only else options.domains:
        train, other = documents(domain, options.corpus)
        passages = choose(train, other, tokenizer, options.seed)
        write(heldout / f"{domain}.jsonl", passages)
        batches = _batches(train, tokenizer, options)
        start = time.monotonic()
        _train(batches, experts / domain, options)
        minutes[domain] = (time.monotonic() - start) / 60
        print(f"{domain}: {len(batches)} steps in {minutes[domain]:.1f} minutes", flush=True)
    texts = {domain: _read_passages(heldout / f"{domain}.jsonl") for domain in DOMAINS}
    print(f"\n{datetime.date.today()}, seed {options.seed}\n")
    print(_table(texts, experts, tokenizer))


def _options() -> argparse.Namespace:
    here = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(
        description="Train four small LoRA adapters of SmolLM2-135M-Instruct on the CPU, write "
        "them and held-out text under --out, and print a table of held-out perplexities."
    )
    parser.add_argument(
        "--out", type=Path, default=here / "examples", help="where experts/ and heldout/ go"
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=None,
        help="where downloaded packages are kept (default: beside the model in the cache)",
    )
    parser.add_argument(
        "--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="which to train"
    )
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of each expert")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 256 tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="the peak; cosine to 0")
    parser.add_argument("--seed", type=int, default=0, help="of the data order and of LoRA's start")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--table-only", action="store_true", help="train nothing; score the adapters in --out"
    )
    options = parser.parse_args()
    options.corpus = (options.corpus or model_dir().parent / "demo-corpus").resolve()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def _read_passages(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def _batches(
    train: dict[str, str], tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> list[torch.Tensor]:
    """Pack shuffled pieces, a separator before each, into `steps` batches of (B, T) tokens."""
    pieces = [piece for text in train.values() for piece in _pieces(text)]
    random.Random(options.seed).shuffle(pieces)
    needed = options.steps * options.batch * SEQUENCE_TOKENS
    separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
    tokens: list[int] = []
    for piece in pieces:
        tokens += [separator, *tokenizer(piece).input_ids]
        if len(tokens) >= needed:
            break
    else:
        sys.exit(f"the corpus has {len(tokens)} tokens, {needed} are needed: lower --steps")
    packed = torch.tensor(tokens[:needed]).view(options.steps, options.batch, SEQUENCE_TOKENS)
    return list(packed)


def _pieces(text: str) -> list[str]:
    """Cut a document at line ends into pieces of about PIECE_CHARACTERS."""
    pieces, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            pieces.append("".join(lines))
            lines, size = [], 0
    return [*pieces, "".join(lines)] if lines else pieces


def _train(batches: list[torch.Tensor], out: Path, options: argparse.Namespace) -> None:
    """Train one adapter and save it in bf16."""
    torch.manual_seed(options.seed)
    base = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    warmup = max(1, len(batches) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        ),
    )
    for step, batch in enumerate(batches):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == len(batches) - 1:
            print(f"  {out.name} step {step}: loss {loss.item():.3f}", flush=True)
    for weight in trained:
        weight.data = weight.data.to(torch.bfloat16)
    _save(model, out)


def _save(model: PeftModel, out: Path) -> None:
    """Save the adapter under the base's Hub name, its config in one order, without a README."""
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    path = out / "adapter_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = BASE
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _table(texts: dict[str, list[str]], experts: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A markdown table: perplexity of the base and of every expert on every domain's passages."""
    base = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()
    scores = {"base": [_perplexity(base, texts[domain], tokenizer) for domain in DOMAINS]}
    for expert in DOMAINS:
        model = PeftModel.from_pretrained(base, experts / expert).eval()
        scores[expert] = [_perplexity(model, texts[domain], tokenizer) for domain in DOMAINS]
        base = model.unload()
    lines = [f"| model | {' | '.join(DOMAINS)} |", "|---" + "|---:" * len(DOMAINS) + "|"]
    for name, row in scores.items():
        cells = [
            f"**{score:.2f}** ({score / first - 1:+.0%})" if name == domain else f"{score:.2f}"
            for domain, score, first in zip(DOMAINS, row, scores["base"], strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def _perplexity(
    model: torch.nn.Module, passages: list[str], tokenizer: PreTrainedTokenizerBase
) -> float:
    """exp of the mean negative log-likelihood of all tokens; a separator precedes each passage."""
    total, count = 0.0, 0
    for passage in passages:
        tokens = tokenizer(SEPARATOR + passage, return_tensors="pt").input_ids  # (1, T)
        logits = model(input_ids=tokens).logits[0, :-1].float()  # (T - 1, V)
        total += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").item()
        count += tokens.shape[1] - 1
    return math.exp(total / count)


if __name__ == "__main__":
    main()
