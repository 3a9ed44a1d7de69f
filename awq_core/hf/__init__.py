"""The transformers integration: the only place that imports transformers."""
