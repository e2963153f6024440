"""The method: loss, log-probs, references, and the LightningModule that trains with them."""
