"""Asynchronous training: workers push gradients to a parameter server and never wait for the slowest."""
