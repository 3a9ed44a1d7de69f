"""Making AWQ checkpoints: from a dense weight to codes, and from codes to files."""
