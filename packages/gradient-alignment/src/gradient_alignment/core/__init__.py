"""The core: traces, scores, the functions they are taken of, and the regularisers. No other part is imported."""
