"""One file, one stage. In the order they run: ingest, download, deduplicate, embed, recaption, score, pretokenize,
clip_filter, pack.
"""
