"""audit: prove or refute, on this run, that the scores are lawful and the reported number is right."""
