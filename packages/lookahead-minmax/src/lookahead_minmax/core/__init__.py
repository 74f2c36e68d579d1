"""The method: joint lookahead and the base methods that it wraps."""
