"""The training floor: model, data, optimizer, checkpoints, observation, and the trainer that joins them."""
