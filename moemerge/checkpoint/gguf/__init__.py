"""Models in GGUF files as sources: header, config, tensors, tokenizer, as transformers has them."""
