"""Data sets of images on the disk."""
