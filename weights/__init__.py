"""Model files: names, formats, downloads. Imports nothing else of this project."""
