"""Optimizers whose state is small and whose step is one launch."""
