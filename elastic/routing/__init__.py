"""Which member a step trains: curriculum, router, masks, family."""
