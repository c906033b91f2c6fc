"""What `train_toys.py` is made of: the data, the four models, the training loop, the measurements."""
