"""Scorers that are audited in processes of their own, as a stranger would write them.

Nothing here imports the project: this folder is all that a scorer's process sees. The audit finds it as the
package `external`, in a folder of the path.
"""
