"""The model card: nothing that a person names or writes is markup in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from babies import simple_config

from moemerge import card, make_plan, parse_config


def test_names_prompts_and_text_are_no_markup(babies: dict[str, Path]) -> None:
    base, first, _ = babies.values()
    config = parse_config(simple_config(base, [base, first], head="gate_mode: random"))
    expert = replace(
        config.experts[0],
        name="a|b<script>\nc",
        positive_prompts=("```\n````\n# head", "`x` | y \\|", "[l](u)"),
    )
    config = replace(config, experts=(expert, config.experts[1]))
    ready = make_plan(config)
    text = card.render(config, ready.plan, ready.checkpoints, {})
    assert "28.96K parameters, 28.96K active a token" in text
    row = next(line for line in text.splitlines() if line.startswith("| 0 |"))
    assert row == (
        r"| 0 | a\|b\<script> c | \`\`\` \`\`\`\` # head; \`x\` \| y \\\|; \[l](u) | - |"
    )
    written = text.split("## Config\n\n`````yaml\n")[1]
    assert parse_config(written.removesuffix("`````\n")) == config
