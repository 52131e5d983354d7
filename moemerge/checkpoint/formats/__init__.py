"""What a weights file says of its tensors, one file a format."""
