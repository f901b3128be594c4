"""The demo: a tiny mixture of experts learns to speak, then to answer in Spanish; stock PEFT proves the adapter.

Everything is generated: nothing is downloaded.
"""

from expertune.training.demo.story import DemoResult, run_demo

__all__ = ["DemoResult", "run_demo"]
