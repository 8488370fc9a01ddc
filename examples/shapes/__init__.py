"""The shapes world: a world small enough to know exactly, in which every model is real, tiny and trained."""
