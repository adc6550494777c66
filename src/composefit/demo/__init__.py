"""`composefit demo`: a GAN learns to write digits, with the two networks in one training step."""
