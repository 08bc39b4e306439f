"""The cache as data: pool, segments, documents, their lineage, and the plan of a fold over them."""
