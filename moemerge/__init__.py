"""Make one mixture-of-experts language model out of several dense ones."""
