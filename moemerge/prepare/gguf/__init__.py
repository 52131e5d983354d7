"""The plan of a GGUF file: its tensors, its fields, and what an importance matrix weighs."""
