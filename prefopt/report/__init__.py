"""Reports about a run. Reads facts and run folders; never imports a trainer."""
