"""Stage tokenize: documents to token shards, a tokenizer, and the proof that val is not in train."""
