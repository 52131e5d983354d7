"""Training of a LoRA for every linear and every expert's matrices, by transformers' Trainer."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.dense import pick_device
from moemerge.errors import Findings, InputError, Problem
from moemerge.mixture import Moe, dtype_of, load
from moemerge.options import Options, RunOptions
from moemerge.output import writing
from moemerge.reporting import Reporter, Silent, listener
from moemerge.text import batching
from moemerge.training import checkpoints
from moemerge.training.data import Passage, Template, divide, packed
from moemerge.training.peft_files import attach, save
from moemerge.training.settings import Tuning
from moemerge.training.setup import begin

if TYPE_CHECKING:
    import torch


CHECKPOINTS = "checkpoints"
_NOT_LEARNT = -100
"""The label of a token that transformers' loss does not count."""


@dataclass(frozen=True)
class Lora:
    """The adapter: W + alpha / rank * B A (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    With `embeddings`, embeddings and head are trained whole too, in float32. Only their rows from
    `first_row` on change, at the learning rate `embedding_rate` (None: the LoRA's).
    """

    rank: int = 16
    alpha: float = 32
    packing: bool = True
    checkpointing: bool = True
    save_every: int = 50
    resume: bool = False
    embeddings: bool = False
    first_row: int = 0
    embedding_rate: float | None = None


@dataclass(frozen=True)
class Adapted:
    """The result: the number of trained parameters, and the held-out loss before and after."""

    adapter: Path
    parameters: int
    steps: int
    before: float
    after: float


def finetune(
    out: str | Path,
    adapter: str | Path,
    tuning: Tuning,
    lora: Lora | None = None,
    options: Options | None = None,
    reporter: Reporter | None = None,
    progress: bool = False,
) -> Adapted:
    """Train a LoRA adapter of the mixture `out` with transformers' Trainer, into `adapter`.

    With `options.load_in_4bit` the frozen weights are in NF4 (QLoRA). Of conversations only the
    assistant's turns are learnt. With `lora.resume` the training goes on from the last checkpoint,
    as if it had not been interrupted. Under `accelerate launch` each process reads `tuning.batch`
    passages a step, and one of them writes.

    Raises:
        InputError: the mixture, the data or `adapter` cannot be used; nothing was written.
        RunError: a failure on the way.
    """
    lora, options, reporter = lora or Lora(), options or Options(), listener(reporter, progress)
    findings, adapter = Findings(), Path(adapter)
    _check_installed(options)
    moe, passages, length = begin(out, tuning, options, findings, chat_template)
    folder = adapter / CHECKPOINTS
    if lora.resume and not folder.is_dir():
        findings.problem("--resume", f"{adapter} holds no checkpoints", "leave it out")
    elif adapter.exists() and not lora.resume and is_first_process():
        fix = "name a new directory, or pass --resume to go on with what it holds"
        findings.problem(str(adapter), "is there already", fix)
    _check_lora(lora, moe, findings)
    findings.refuse()
    assert moe is not None
    texts, held = divide(passages, tuning.held_out, options.seed)
    if lora.packing:
        texts = packed(texts, length)
    run = {
        "--steps": tuning.steps, "--batch": tuning.batch, "--length": length,
        "--learning-rate": tuning.learning_rate, "--held-out": tuning.held_out,
        "--rank": lora.rank, "--alpha": lora.alpha, "--packing": lora.packing,
        "--embeddings": lora.embeddings, "--first-row": lora.first_row,
        "--embedding-rate": lora.embedding_rate, "--qlora": options.load_in_4bit,
        "--seed": options.seed, "--num_processes": _processes(),
        "--data": checkpoints.digest_of_text([*texts, *held]),
        "OUT": checkpoints.digest_of_weights(moe),
    }  # fmt: skip
    if lora.resume:
        checkpoints.check_same(folder, run, findings)
        findings.refuse()
    reporter = reporter if is_first_process() else Silent()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that its first releases know
        return _run(moe, texts, held, adapter, tuning, lora, options, reporter, run)


def _check_lora(lora: Lora, moe: Moe | None, findings: Findings) -> None:
    for flag, value in (("--rank", lora.rank), ("--save-every", lora.save_every)):
        if value < 1:
            findings.problem(flag, f"is {value}", "write 1 or more")
    if not 0 < lora.alpha < 1e6:
        findings.problem("--alpha", f"is {lora.alpha:g}", "write a number above 0")
    rate, vocabulary = lora.embedding_rate, moe.config.get("vocab_size", 0) if moe else 0
    for flag, said in (
        ("--first-row", lora.first_row != 0),
        ("--embedding-rate", rate is not None),
    ):
        if said and not lora.embeddings:
            findings.problem(flag, "has no effect without --embeddings", "add that, or remove it")
    if moe and not 0 <= lora.first_row < vocabulary:
        fix = f"write a number from 0 to {vocabulary - 1}"
        findings.problem("--first-row", f"is {lora.first_row}", fix)
    if rate is not None and not 0 < rate <= 10:
        findings.problem("--embedding-rate", f"is {rate:g}", "write a number above 0, at most 10")


def is_first_process() -> bool:
    """Whether this is the only process, or the first process of `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_installed(options: RunOptions) -> None:
    needed = ["peft", "accelerate", *(["bitsandbytes"] if options.load_in_4bit else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        what = f"needs packages that are not installed: {', '.join(missing)}"
        fix = "pip install 'moemerge[train]', and bitsandbytes for --qlora"
        raise InputError([Problem("tune", what, fix)])


def chat_template(directory: Path) -> Template | None:
    """The chat template of the tokenizer in a directory, if it has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not tokenizer.chat_template:
        return None

    def spoken(turns: Any, asked: bool) -> str:
        return str(
            tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asked)
        )

    return spoken


def _run(
    moe: Moe,
    texts: list[Passage],
    held: list[Passage],
    adapter: Path,
    tuning: Tuning,
    lora: Lora,
    options: RunOptions,
    reporter: Reporter,
    run: dict[str, Any],
) -> Adapted:
    import torch
    import transformers

    dtype, folder = dtype_of(moe), adapter / CHECKPOINTS
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=tuning.steps,
        per_device_train_batch_size=tuning.batch,
        per_device_eval_batch_size=tuning.batch,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=tuning.steps // 20,
        weight_decay=0.0,
        bf16=dtype == torch.bfloat16,
        gradient_checkpointing=lora.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if lora.checkpointing else None,
        ddp_find_unused_parameters=True,
        save_steps=lora.save_every,
        save_total_limit=2,
        logging_steps=max(1, tuning.steps // 20),
        report_to="none",
        log_level="error",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=pick_device(options.device) == "cpu",
    )  # before the model, for of several processes it gives each its device
    transformers.set_seed(options.seed)
    model = load(moe, options, reporter, dtype)
    wrapped = attach(model, lora.rank, lora.alpha, lora.embeddings, dtype)
    if lora.checkpointing:
        wrapped.enable_input_require_grads()
    rows = [one for name, one in wrapped.named_parameters() if ".modules_to_save." in name]
    for parameter in rows if lora.first_row else ():
        parameter.register_hook(_only_from(lora.first_row))
    trainer = _trainer_class(rows, lora.embedding_rate)(
        model=wrapped, args=settings, train_dataset=texts, eval_dataset=held, data_collator=collate
    )
    trainer.remove_callback(transformers.PrinterCallback)
    found = checkpoints.last(folder) if lora.resume else None
    if found:
        at, before = found
        reporter.say(f"goes on from {at}")
    else:
        at, before = None, _held_out_loss(trainer, reporter)
        if is_first_process():
            with writing(adapter):
                checkpoints.begin(folder, run, before)
    with reporter.progress("training", tuning.steps, "step") as advance:
        trainer.add_callback(_listener(advance, reporter))
        if at and checkpoints.step_of(at) >= tuning.steps:  # of which Trainer would make one more
            wrapped.load_adapter(str(at), "default", is_trainable=True)
        else:
            trainer.train(resume_from_checkpoint=str(at) if at else None)
    after = _held_out_loss(trainer, reporter)
    batching.check_loss(after, "the held-out loss", "lower the learning rate")
    if is_first_process():
        save(wrapped, moe, adapter, dtype)
    count = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return Adapted(adapter, count, tuning.steps, before, after)


def _held_out_loss(trainer: Any, reporter: Reporter) -> float:
    with reporter.progress("reading held-out text", 1, "reading"):
        return float(trainer.evaluate()["eval_loss"])


def _only_from(row: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that zeroes the gradient of the rows before `row`, so that they do not change."""

    def cut(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[:row] = 0
        return grad

    return cut


def _trainer_class(rows: list[Any], rate: float | None) -> Any:
    """transformers' Trainer with a learning rate of its own for embeddings and head."""
    import transformers

    class Trainer(transformers.Trainer):  # type: ignore[misc]
        def create_optimizer(self, *args: Any, **named: Any) -> Any:
            made = self.optimizer is None
            optimizer = super().create_optimizer(*args, **named)
            apart = {id(one) for one in rows} if made and rate is not None else set()
            for group in [*optimizer.param_groups] if apart else ():
                own = [one for one in group["params"] if id(one) in apart]
                group["params"] = [one for one in group["params"] if id(one) not in apart]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
            return optimizer

    return Trainer


def _listener(advance: Callable[[int], object], reporter: Reporter) -> Any:
    """A callback that reports steps and losses."""
    import transformers

    class Listener(transformers.TrainerCallback):  # type: ignore[misc]
        at = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(state.global_step - self.at)
            self.at = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                reporter.detail(f"step {state.global_step}: loss {logs['loss']:.4f}")

    return Listener()


def collate(passages: list[Passage]) -> dict[str, Any]:
    """A batch for transformers, each tensor (B, T); positions start at 0 for every packed text."""
    width = max(len(one.ids) for one in passages)
    labels, positions = [], []
    for one in passages:
        learnt = zip(one.ids, one.counted, strict=True)
        labels.append([token if own else _NOT_LEARNT for token, own in learnt])
        ends = (*one.starts[1:], len(one.ids), width)  # the padding is a text, too
        lengths = [
            stop - start for start, stop in zip((*one.starts, len(one.ids)), ends, strict=True)
        ]
        positions.append([at for length in lengths for at in range(length)])
    return {
        "input_ids": batching.padded(one.ids for one in passages),
        "labels": batching.padded(labels, _NOT_LEARNT),
        "position_ids": batching.padded(positions),
    }
