"""The floor of a training step: it takes the activations of attached modules, and adds their penalties to the loss."""
