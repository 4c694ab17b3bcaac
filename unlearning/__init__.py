"""Classifiers and samples of the user's own, taken as they come, or refused in one line."""
