"""The method itself: injection, preferences, both paths, objective, schedule, merging."""
