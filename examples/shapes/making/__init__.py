"""How each model of the shapes world is built and trained: one file a model, fixed seeds, one thread each."""
