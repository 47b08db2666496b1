"""Check a record folder: do its files agree with each other and with what is known?"""
