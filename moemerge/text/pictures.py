"""Prompts with a picture, encoded by the processor that a model came with.

Needs transformers and Pillow. Without torchvision, a processor that could also read videos reads
pictures only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moemerge.errors import first_line
from moemerge.text.encoder import Prompt, Seen

if TYPE_CHECKING:
    import torch

_CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
_BESIDE = ("input_ids", "attention_mask")


class Pictures:
    """A model's processor, read without running any code of its repository."""

    def __init__(self, directory: Path):
        """Open the processor of a model directory.

        Raises:
            ValueError: there is none that can be read.
        """
        try:
            self.processor = _open(directory)
        except Exception as error:  # errors of many libraries reach this line
            raise ValueError(f"its processor cannot be read ({first_line(error)})") from error

    def encode(self, file: Path, text: str) -> Prompt:
        """Encode a picture and the text after it; all tokens are the prompt's own.

        Raises:
            ValueError: the picture cannot be read, or is none that the processor takes.
        """
        from PIL import Image

        names = ("vision_start_token", "image_token", "vision_end_token")
        marks = "".join(getattr(self.processor, name, None) or "" for name in names)
        try:
            with Image.open(file) as opened:
                picture = opened.convert("RGB")
            made = self.processor(text=[marks + text], images=[picture], return_tensors="pt")
        except Exception as error:  # errors of many libraries reach this line
            why = first_line(error)
            raise ValueError(f"{file} cannot be read as a picture ({why})") from error
        ids = tuple(made["input_ids"][0].tolist())
        given = {name: value for name, value in made.items() if name not in _BESIDE}
        return Prompt(ids, 0, Seen(given, _digest(given)))


def _digest(given: Mapping[str, torch.Tensor]) -> str:
    made = hashlib.blake2b(digest_size=16)
    for name, value in sorted(given.items()):
        made.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        made.update(value.contiguous().numpy().tobytes())
    return made.hexdigest()


def _open(directory: Path) -> Any:
    import transformers

    kind = getattr(transformers, _class_of(directory))
    pictures = transformers.AutoImageProcessor.from_pretrained(directory)
    parts = {name: None for name in kind.get_attributes() if name != "chat_template"}
    parts["image_processor"] = pictures
    # As it stands in tokenizer.json: a family's own class may split words in another way.
    parts["tokenizer"] = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return _of_pictures_alone(kind)(**parts)


def _class_of(directory: Path) -> str:
    """The name of the processor's class in transformers.

    Raises:
        ValueError: no file names one.
    """
    for name in _CONFIGS:
        path = directory / name
        said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        kind = said.get("processor_class")
        if isinstance(kind, str) and kind.isidentifier() and kind.endswith("Processor"):
            return kind
    raise ValueError(f"no processor_class in {', '.join(_CONFIGS)}")


def _of_pictures_alone(kind: type[Any]) -> type[Any]:
    """The class, but parts that read other things than text and pictures may be missing."""

    def check(self: Any, name: str, given: Any) -> Any:
        if given is None:
            return None
        return super(made, self).check_argument_for_proper_class(name, given)

    made: type[Any] = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    return made
