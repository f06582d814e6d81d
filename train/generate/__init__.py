"""Text from a model: latent cache, sampling, drafts of the MTP layers."""
