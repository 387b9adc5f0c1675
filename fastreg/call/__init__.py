"""The floor of one call: from its arguments to the penalty, and from the upstream gradient to the gradients."""
