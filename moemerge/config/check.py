"""What must be true of a config's values before any model is opened."""

from __future__ import annotations

from moemerge.config.schema import MergeConfig
from moemerge.errors import Findings, nearest

BODIES = ("base", "average", "regmean")
ALIGN = ("auto", "true", "false")


def check_values(config: MergeConfig, findings: Findings) -> None:
    """Record what is wrong with values of the right type."""
    if not config.experts and not config.split:
        what = "is empty" if "experts" in config.lines else "is missing"
        findings.problem(config.where("experts"), what, "list at least one expert")
    count = config.experts_per_token
    if count is not None and not 1 <= count <= max(len(config.experts), 1) and not config.split:
        findings.problem(
            config.where("experts_per_token"),
            f"is {count} with {len(config.experts)} experts",
            f"write a number from 1 to {len(config.experts)}",
        )
    said = config.gate.get("mode")
    if said is not None and config.gate_mode is not None and said != config.gate_mode:
        what = f"is {said!r}, gate_mode is {config.gate_mode!r}"
        findings.problem(config.where("gate.mode"), what, "keep one of them")
    if config.body not in BODIES:
        what = f"{config.body!r} is no body"
        findings.problem(config.where("body"), what, nearest(config.body, BODIES))
    elif config.experts and not sum(expert.body_weight for expert in config.experts) > 0:
        findings.problem(config.where("experts"), "have no body_weight above 0", "give one")
    if config.align not in ALIGN:
        what = f"{config.align!r} is none of {', '.join(ALIGN)}"
        findings.problem(config.where("align"), what, nearest(config.align, ALIGN))
    names: dict[str, str] = {}
    for at, expert in config.every_expert:
        for name in ("noise_scale", "residual_scale"):
            scale = getattr(expert, name)
            if not abs(scale) <= 1e30:
                findings.problem(
                    config.where(f"{at}.{name}"),
                    f"is {scale:g}",
                    "write a number between -1e30 and 1e30",
                )
        if not 0 <= expert.body_weight <= 1e30:
            what = f"is {expert.body_weight:g}"
            findings.problem(config.where(f"{at}.body_weight"), what, "a weight is 0 or more")
        elif expert.body_weight != 1 and (config.body == "base" or "shared" in at):
            why = "it is shared" if "shared" in at else "body is base"
            findings.without_effect(f"{at}.body_weight", f": {why}")
        if not 0 <= expert.renew <= 1:
            what = f"is {expert.renew:g}"
            findings.problem(config.where(f"{at}.renew"), what, "a share is from 0 to 1")
        if expert.noise_scale < 0:
            findings.problem(
                config.where(f"{at}.noise_scale"),
                f"is {expert.noise_scale:g}",
                "a standard deviation is 0 or more",
            )
        if expert.name and expert.name in names:
            findings.problem(
                config.where(f"{at}.name"),
                f"{expert.name!r} is {names[expert.name]}'s name too",
                "give each expert its own",
            )
        names.setdefault(expert.name, at)
        for kind in ("positive_prompts", "negative_prompts"):
            for number, prompt in enumerate(getattr(expert, kind)):
                if not str(prompt).strip():
                    findings.problem(
                        config.where(f"{at}.{kind}[{number}]"), "is empty", "write a prompt"
                    )
