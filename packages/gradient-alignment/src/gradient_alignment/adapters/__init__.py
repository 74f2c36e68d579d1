"""Surgery on the user's own model."""
