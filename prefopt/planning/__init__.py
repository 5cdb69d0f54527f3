"""What training needs of memory, and which way of training fits on which GPUs."""
