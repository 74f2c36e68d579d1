"""The paper's experiments in kind: a language model, corpora, training."""
