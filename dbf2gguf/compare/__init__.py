"""One model, one text, one table: this project's files beside what others make of the same model.

`python -m dbf2gguf.compare`; `__main__` tells the story. Peers are used where they are installed and skipped,
with a line that says how to get them, where they are not; none is needed by the rest of the project.
"""
