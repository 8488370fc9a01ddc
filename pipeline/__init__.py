"""The vocabulary and the engine: samples, stages, tables, plans, runners, shards. Loads no model, names no stage."""
