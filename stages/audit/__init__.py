"""audit: prove or refute, on a concrete run, that scores are lawful and the number is right."""
