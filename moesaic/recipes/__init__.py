"""Whole paths as stories, one file each; compress.py is the story of the whole tool. Nothing is computed here itself."""
