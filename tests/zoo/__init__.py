"""The zoo: small scorers and submissions, lawful ones and known cheats, on which the audit is tested.

registry.py lists the cheats, who used them, and the check that must detect each.
"""
