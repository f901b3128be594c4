"""What a training step keeps, computes again or moves, so that a layer's memory is spent where it is worth it."""
