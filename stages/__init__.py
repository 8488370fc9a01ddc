"""One file, one stage. In the order they run: ingest, download, deduplicate, embed, deduplicate_semantic, recaption,
score, pretokenize, clip_filter, pack.
"""
