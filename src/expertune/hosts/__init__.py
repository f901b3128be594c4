"""The only part that knows Transformers, PEFT and TRL: how they lay out what the walk needs and hand it over."""
