"""What everything else stands on: checks of arguments, and what holds under PyTorch's modes."""
