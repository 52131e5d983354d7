"""After the merge: routers trained in place, and LoRA adapters, trained and merged."""
