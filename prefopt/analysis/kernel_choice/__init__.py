"""Which kernel and divergence of `kernel_dpo` suit a preference set: measured, and tested in short trainings."""
