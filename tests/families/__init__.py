"""Every family of the installed Transformers that has experts, found by looking."""
