"""What the loss of a step takes: log-probabilities of labels, without the logits of all tokens at once."""
