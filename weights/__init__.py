"""The files of a model: names, formats, downloads; imports nothing of this project outside this folder."""
