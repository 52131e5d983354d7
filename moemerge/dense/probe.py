"""One layer of a family's class compared with one of a model's own class, on random input."""

from __future__ import annotations

from typing import Any

from moemerge.dense.run import settings_of

_TOKENS, _ROWS = 24, 8


def differs_by(raw: dict[str, Any], config: dict[str, Any]) -> float | None:
    """The largest difference of the outputs, as a share of the largest output.

    `raw` is the model's config.json, `config` the normalised config of the family that it is read
    as. Both classes get the same random weights and one layer. None if transformers has no class
    for the model's own model_type.

    Raises:
        ValueError: the two classes do not have the same weights.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    if raw["model_type"] not in CONFIG_MAPPING:
        return None
    small = {"num_hidden_layers": 1, "vocab_size": _ROWS, "pad_token_id": None}

    def built(settings: dict[str, Any]) -> Any:
        types = settings.get("layer_types")
        own = {"layer_types": types[:1]} if isinstance(types, list) else {}
        model = AutoModel.from_config(AutoConfig.for_model(**{**settings, **small, **own}))
        return model.float().eval()

    torch.manual_seed(0)
    one, two = built(raw), built(settings_of(config))
    for parameter in one.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    try:
        two.load_state_dict(one.state_dict())
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    states = torch.randn(1, _TOKENS, config["hidden_size"])
    with torch.inference_mode():
        outputs = [model(inputs_embeds=states).last_hidden_state for model in (one, two)]
    return float((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max())
