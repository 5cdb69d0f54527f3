"""How much memory training needs, and which way of training fits on which GPUs."""
