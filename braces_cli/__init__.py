"""braces: fine-tune, evaluate, steer and inspect causal language models with LLMBraces adapters (arXiv 2503.16334)."""

__version__ = "0.1.0"
