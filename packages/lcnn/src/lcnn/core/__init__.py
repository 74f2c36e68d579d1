"""The method: activation, normalisation, operator norms, bound, penalties, objective."""
