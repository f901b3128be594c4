"""Triton device code and its launchers, one operation a file. Nothing is compiled or probed on import."""
