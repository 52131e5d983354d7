"""The commands' options, and mergekit-moe's flags that mean nothing in moemerge."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_args

import typer

from moemerge.cli.terminal import Terminal
from moemerge.errors import InputError, Problem
from moemerge.options import Options

NO_MEANING = {
    "--lazy-unpickle": "weights are always read lazily, and no pickle is ever run",
    "--trust-remote-code": "no repository's code is ever run",
    "--clone-tensors": "tensors are never shared",
    "--low-cpu-memory": "memory is bounded anyway; --lazy bounds what gate modes run too",
    "--safe-serialization": "safetensors is the only format written",
    "--write-model-card": "the card is always written",
    "--read-to-gpu": "bytes go from file to file",
    "--multi-gpu": "bytes go from file to file",
    "--gpu-rich": "bytes go from file to file",
    "--async-write": "--jobs threads read, compute and write",
    "--unsafe-truncate-embeddings": "experts' embeddings are not used",
}
"""mergekit-moe's flags that have nothing to do here, and why."""

NO_MEANING_WITH_VALUE = {
    "--lora-merge-cache": "adapters are merged while streaming, never written out",
    "--lora-merge-dtype": "adapters are merged in float32",
    "--write-threads": "--jobs threads read, compute and write",
}
"""mergekit-moe's options with a value that have nothing to do here, and why."""


def _option(kind: Any, default: Any, *names: str, help: str, **more: Any) -> inspect.Parameter:
    name = names[0].split("/")[-1].lstrip("-").removeprefix("no-").replace("-", "_")
    annotation = Annotated[kind, typer.Option(*names, help=help, **more)]
    return inspect.Parameter(
        more.pop("field", name), inspect.Parameter.KEYWORD_ONLY, default=default,
        annotation=annotation,
    )  # fmt: skip


UNHEARD = "moemerge: mergekit's flags that mean nothing here"
"""The key of the lines about such flags in the command's context, until they are printed."""

_UNTRAINED = "--i-understand-this-is-not-useful-without-training"

OPTIONS = {
    "lazy": _option(bool, False, "--lazy", help="Low memory: a gate mode that runs a model "
                    "holds one decoder layer at a time, not two (with self: not all layers)."),
    "shard_size": _option(str, "5GB", "--shard-size", "--out-shard-size", metavar="SIZE",
                          help="The most a shard holds: 1B or 500M parameters, 5GB or 2GiB bytes."),
    "seed": _option(int, 0, "--seed", "--random-seed", help="Seed of random gates and noise."),
    "device": _option(str, "auto", "--device", metavar="auto|cpu|cuda[:N]|mps",
                      help="Device of the models that gate modes run."),
    "cuda": _option(bool | None, None, "--cuda/--no-cuda", hidden=True,
                    help="The same as --device cuda, or --device cpu."),
    "load_in_4bit": _option(bool, False, "--load-in-4bit",
                            help="Quantise the models that gate modes run (bitsandbytes)."),
    "load_in_8bit": _option(bool, False, "--load-in-8bit",
                            help="Quantise the models that gate modes run (bitsandbytes)."),
    "overwrite": _option(bool, False, "--overwrite",
                         help="Replace the files that moemerge wrote to OUT before."),
    "verify": _option(bool, True, "--verify/--no-verify",
                      help="Check the finished files against the plan."),
    "copy_tokenizer": _option(bool, True, "--copy-tokenizer/--no-copy-tokenizer",
                              help="Copy the base model's tokenizer and chat template."),
    "allow_crimes": _option(bool, False, "--allow-crimes/--no-allow-crimes",
                            help="Mix model families if shapes and activation agree."),
    "untrained_ok": _option(bool, False, _UNTRAINED,
                            help="Do not note that equal experts need training."),
    "cache_dir": _option(str | None, None, "--cache-dir", "--transformers-cache", metavar="DIR",
                         help="The Hub's cache (default: the usual one)."),
    "jobs": _option(
        int | None, None, "--jobs", "-j", "--num-threads",
        help="Threads that read, compute and write; each holds a buffer of 16 MiB.  "
        "[default: two a processor]",
    ),
    "direct": _option(
        bool,
        True,
        "--direct/--no-direct",
        help="Write past the page cache if the file system can. Files larger than memory are "
        "written several times faster, and other cached files stay cached.",
    ),
    "checksums": _option(
        bool,
        True,
        "--checksum/--no-checksum",
        help="Checksum every shard while it is written. With --no-checksum, the kernel copies "
        "unchanged tensors, and shares their blocks if the file system can (btrfs, xfs).",
    ),
    "type": _option(
        str,
        "",
        "--type",
        metavar="KIND",
        show_default=False,
        help="For OUT.gguf, the kind of file: f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs and "
        "others. Without it, tensors keep the types that they have.",
    ),
    "exact": _option(bool, False, "--exact",
                     help="For OUT.gguf: only if all bytes beside the routers can be copied."),
    "imatrix": _option(
        str,
        "",
        "--imatrix",
        metavar="FILE",
        show_default=False,
        help="For OUT.gguf, an importance matrix: a GGUF file that llama-imatrix wrote. The kinds "
        "of fewer than three bits need one.",
    ),
    "statistics": _option(
        bool,
        False,
        "--statistics",
        help="Keep the router inputs of the prompts in OUT, so that `moemerge add` can solve the "
        "routers anew without these prompts. They are not pushed.",
    ),
    "shards": _option(
        str,
        "",
        "--shards",
        metavar="PART/PARTS",
        show_default=False,
        help="Write one share of the shards: 0/8 to 7/8 on eight machines with one file system. "
        "The last one completes OUT.",
    ),
    "stream": _option(
        bool,
        False,
        "--stream",
        help="Keep no copy of models on the Hub: read only the byte ranges that the merge needs, "
        "straight into the output.",
    ),
    "push": _option(
        str,
        "",
        "--push",
        metavar="USER/NAME",
        show_default=False,
        help="Upload the result to this repository on the Hub.",
    ),
    "private": _option(bool, False, "--private", help="Make the repository private."),
    "push_as_you_go": _option(
        bool,
        False,
        "--push-as-you-go",
        help="Upload each finished shard and delete it here. At most two shards are on the disk, "
        "and OUT holds no model at the end.",
    ),
    "ray": _option(
        str,
        "",
        "--ray",
        metavar="[ADDRESS]",
        show_default=False,
        help="Write on a Ray cluster (moemerge[ray]); without an address, on a local one.",
    ),
    "card": _option(
        str,
        "",
        "--card",
        metavar="FILE",
        show_default=False,
        help="A markdown file for the beginning of the model card. Keys of its YAML head win.",
    ),
    "card_config": _option(
        bool,
        True,
        "--config-in-card/--no-config-in-card",
        help="Show the config and the prompts in the model card. (moemerge.json holds them.)",
    ),
    "quiet": _option(bool, False, "--quiet/--no-quiet", "-q", help="Print errors only."),
    "verbose": _option(bool, False, "--verbose", "-v", help="Print a line for every shard."),
}  # fmt: skip
"""The options of `merge` and `plan`, in the order of their help."""

READING = ("lazy", "device", "cuda", "cache_dir", "quiet")
"""The options of a command that runs models and writes none."""

SAYING = ("quiet", "verbose")
"""The options of every command that may take long."""

TRAINING = ("cache_dir", *SAYING)
"""The options of a command that trains, beside the device and the seed."""

BUILDING = ("overwrite", "verify", "copy_tokenizer", "jobs", "direct", "checksums", "cache_dir",
            "stream", "quiet", "verbose")  # fmt: skip
"""The options of a command that makes one model from another's files."""

GATING = ("lazy", "seed", "device", "cuda", "load_in_4bit", "load_in_8bit", "allow_crimes",
          "untrained_ok", "cache_dir", "card", "card_config", "quiet", "verbose")  # fmt: skip
"""The options of a command that makes only routers."""


def with_options(*names: str, **helps: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add these OPTIONS to a command, which gets `options` and `terminal`.

    `helps` are help texts for this command, by option, in place of the usual ones.

    If the command has a parameter `typed`, it gets the names of all options that were typed, even
    with their default values.
    """
    return functools.partial(_with_options, names or tuple(OPTIONS), helps)


def _with_options(
    names: tuple[str, ...], helps: Mapping[str, str], command: Callable[..., None]
) -> Callable[..., None]:
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name not in ("options", "terminal", "typed")
    ]
    hears = "typed" in inspect.signature(command).parameters
    shared = [_parameter(name, helps.get(name)) for name in names]

    @functools.wraps(command)
    def wrapped(ctx: typer.Context, **values: Any) -> None:
        given = frozenset(
            name for name in values if str(ctx.get_parameter_source(name)).endswith("COMMANDLINE")
        )
        chosen = {name: values.pop(name) for name in names}
        chosen = {n: v if n in given else getattr(Options, n, v) for n, v in chosen.items()}
        quiet, verbose = chosen.pop("quiet"), chosen.pop("verbose", False)
        terminal = Terminal(quiet, verbose)
        for line in ctx.meta.get(UNHEARD, ()):
            terminal.say(line)
        if quiet and verbose:
            raise InputError([Problem("--quiet", "and --verbose cannot both be", "keep one")])
        cuda = chosen.pop("cuda", None)
        if cuda is not None:
            if "device" not in given:
                chosen["device"] = "cuda" if cuda else "cpu"
            elif chosen["device"].startswith("cuda") != cuda:
                flag, device = "--cuda" if cuda else "--no-cuda", chosen["device"]
                what = f"and --device {device} disagree"
                raise InputError([Problem(flag, what, "keep one of them")])
        if hears:
            values["typed"] = given
        command(**values, options=Options(**chosen), terminal=terminal)

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    wrapped.__signature__ = inspect.Signature([context, *parameters, *shared])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in [context, *parameters, *shared]}
    return wrapped


def _parameter(name: str, help: str | None) -> inspect.Parameter:
    """The option as a command's parameter, with another help text if one is given."""
    parameter = OPTIONS[name].replace(name=name)
    if help is None:
        return parameter
    kind, option = get_args(parameter.annotation)
    option = copy.copy(option)
    option.help = help
    return parameter.replace(annotation=Annotated[kind, option])


def with_ray_address(args: list[str]) -> Iterator[str]:
    """The arguments, with `local` after a `--ray` without an address."""
    for argument, after in zip(args, [*args[1:], ""], strict=True):
        yield argument
        if argument == "--ray" and not re.fullmatch(r"auto|local|(ray://)?[\w.-]+:\d+", after):
            yield "local"


def meaningful(args: list[str], unheard: list[str]) -> Iterator[str]:
    """The arguments without mergekit-moe's flags that mean nothing here.

    A line about each is added to `unheard`. `with_options` prints the lines, unless --quiet.
    """
    rest = iter(args)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        plain = name.replace("--no-", "--", 1)
        reason = NO_MEANING.get(plain) or NO_MEANING_WITH_VALUE.get(name)
        if argument == "--":
            yield argument
            yield from rest
        elif reason is None:
            yield argument
        else:
            unheard.append(f"{name} means nothing here: {reason}")
            if name in NO_MEANING_WITH_VALUE and not equals:
                next(rest, None)
