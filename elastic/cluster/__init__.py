"""What several processes on several machines need."""
