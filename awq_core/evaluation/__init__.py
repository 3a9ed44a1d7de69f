"""How good a quantized model is: perplexity on a held-out text, and the divergence from the dense model."""
