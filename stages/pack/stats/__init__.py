"""Statistics of the packed tensors: layers.tsv and the metrics of pack."""
