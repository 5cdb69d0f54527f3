"""What is read after a run. Reads facts and run folders; never imports a trainer."""
