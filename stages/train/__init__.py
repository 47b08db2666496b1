"""train: shards to the averaged weights of a model. The model, its optimizers, its data order and its loop."""
