"""tokenize: documents to shards, a tokenizer, and the hashes that prove val is not in train."""
