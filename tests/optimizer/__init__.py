"""The surface that torch.optim describes: arguments, errors, conventions."""
