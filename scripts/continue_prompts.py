"""Let a merged model continue one prompt per domain of the demo experts.

python scripts/continue_prompts.py MODEL_DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = {
    "c": "/* Return the number of bytes in the buffer. */\nextern size_t ",
    "french": "La commande affiche la liste des fichiers ",
    "legal": "The Licensee shall not, without the prior written consent of ",
    "sql": "SELECT name, total FROM orders WHERE ",
}
"""How a text of each domain begins."""


def main() -> None:
    """Print each prompt and what the model makes of it, 40 tokens, greedily."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model directory")
    model_dir: Path = parser.parse_args().model
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    for domain, prompt in PROMPTS.items():
        ids = tokenizer(f"<|endoftext|>{prompt}", return_tensors="pt").input_ids
        with torch.inference_mode():
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=40,
                do_sample=False,
                pad_token_id=0,
            )
        print(f"--- {domain}\n{prompt}[{tokenizer.decode(made[0, ids.shape[1] :])}]")


if __name__ == "__main__":
    main()
