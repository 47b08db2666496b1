"""Check the folder of a record, by anybody: its files against each other and against known facts."""
