"""Text, conversations and images, and the rows of token ids that they become. Leaves out running a model on them."""
