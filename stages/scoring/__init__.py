"""Code that both evaluations, the audit and the bundle share.

stream.py opens the validation stream, evaluate.py runs a scorer over it, queries.py defines what a
scorer on top of another may request, and byte_tree.py and byte_tree_logits.py turn a distribution
over tokens into binary decisions over bytes.
"""
