"""Models in GGUF files, as sources: header, config, tensors and tokenizer in transformers' terms."""
